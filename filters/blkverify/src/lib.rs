//! For tests of formats: compares what is read from one child with what is in another, to which all is written too.
use driveline_sdk::{Alarm, Buffer, Info, Memory, RangeLock, info, prelude::*};

/// A node that compares.
#[derive(Debug)]
pub struct Blkverify {
    test: ChildId,
    alarm: Alarm,
    /// A write and a read of the same bytes at the same time may find either data, and not the same in both children.
    busy: RangeLock,
}

/// The child that is trusted.
const RAW: ChildId = 0;

#[filter(
    name = "blkverify",
    default = "deny",
    summary = "compares every read with another child, for tests",
    children("test"),
    child_words("raw")
)]
impl Filter for Blkverify {
    type Options = NoOptions;

    fn open(_: NoOptions, cx: &OpenCx<'_>) -> Result<Self> {
        Ok(Self { test: cx.child("test")?, alarm: cx.alarm(), busy: RangeLock::new() })
    }

    /// It is what is tested, to look at.
    fn info(&self, children: &[Info], shown: Info) -> Info {
        let test = children[self.test];
        Info {
            size_bytes: test.size_bytes,
            flags: (shown.flags | test.flags) & info::READ_ONLY,
            cluster_bytes: test.cluster_bytes,
            ..shown
        }
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let _held = self.busy.lock_shared(request.range()).await;
        let mut expected = Buffer::new(request.length() as usize);
        let memory = Memory::of_mut(&mut expected);
        let raw = next.child(RAW).read(&memory.read_request(request.offset())).await;
        drop(memory);
        // Into memory of our own: the guest's may change while we compare.
        let mut found = Buffer::new(request.length() as usize);
        let memory = Memory::of_mut(&mut found);
        let test = next.child(self.test).read(&memory.read_request(request.offset())).await;
        drop(memory);
        self.compare_results("read", request.offset(), request.length(), &raw, &test)?;
        test?;
        if let Some(at) = expected.iter().zip(found.iter()).position(|(a, b)| a != b) {
            let offset = request.offset() + at as u64;
            return Err(self.mismatch(format_args!(
                "read sector_num={} nb_sectors={} contents mismatch at offset {offset}",
                request.offset() / 512,
                request.length().div_ceil(512)
            )));
        }
        request.fill(0, &found);
        Ok(())
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let _held = self.busy.lock(request.range()).await;
        // The guest's memory may change; both children must get the same.
        let mut data = Buffer::new(request.length() as usize);
        request.copy_to(0, &mut data);
        let memory = Memory::of_mut(&mut data);
        let write = memory.write_request(request.offset(), request.flags()).with_scope(request.scope());
        let raw = next.child(RAW).write(&write).await;
        let test = next.child(self.test).write(&write).await;
        self.compare_results("write", request.offset(), request.length(), &raw, &test)?;
        test
    }

    /// What is compared with need not survive anything.
    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        next.child(self.test).flush(request).await
    }
}

impl Blkverify {
    fn compare_results(
        &self,
        what: &str,
        offset: u64,
        length: u64,
        raw: &Result<()>,
        test: &Result<()>,
    ) -> Result<()> {
        let code = |result: &Result<()>| result.as_ref().err().map_or(0, |error| -error.code());
        if code(raw) == code(test) {
            return Ok(());
        }
        Err(self.mismatch(format_args!(
            "{what} sector_num={} nb_sectors={} return value mismatch {} != {}",
            offset / 512,
            length.div_ceil(512),
            code(raw),
            code(test)
        )))
    }

    /// QEMU ends its process here. We end the request, and say of the node that it is not to be trusted.
    fn mismatch(&self, what: std::fmt::Arguments<'_>) -> Error {
        let text = format!("blkverify: {what}");
        self.alarm.raise(&text);
        Error::IO.because(text)
    }
}

export_filters![Blkverify];

#[cfg(test)]
mod tests;
