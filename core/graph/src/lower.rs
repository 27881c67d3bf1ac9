//! Lower, never bypass: an operation that a node does not know arrives as ones that it knows, or not at all.

use driveline_op::{
    BlockStatus, BlockStatusRequest, Buffer, CacheRequest, ConstMemory, DiscardRequest, Error, Next, OpTable,
    Result, WriteRequest, WriteZeroesRequest, flag, status,
};

/// Stands before a node; child 0 is the node, by the operations that it has.
pub(crate) struct Lower;

pub(crate) static LOWER: OpTable<Lower> = OpTable::new()
    .discard(Lower::discard)
    .write_zeroes(Lower::write_zeroes)
    .block_status(Lower::block_status)
    .cache(Lower::cache);

/// Stands before a node that does not know all flags; child 0 is the node. What it does not know is taken away: it must be
/// a flag that only says how something may be done.
pub(crate) struct Strip {
    pub(crate) flags_known: u32,
}

pub(crate) static STRIP: OpTable<Strip> =
    OpTable::new().write(Strip::write).block_status(Strip::block_status);

impl Strip {
    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        if request.flags() & !self.flags_known == 0 {
            return next.write(request).await;
        }
        next.write(&request.with_flags(request.flags() & self.flags_known)).await
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        next.block_status(&request.with_flags(request.flags() & self.flags_known)).await
    }
}

/// How much is zeroed with one write.
const ZEROES_BYTES_MAX: u64 = 1 << 20;

impl Lower {
    /// Zeroes become a write of zeroes.
    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        if request.flags() & flag::NO_FALLBACK != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        let zeroes = Buffer::new(request.length().min(ZEROES_BYTES_MAX) as usize);
        let mut range = request.range();
        while !range.is_empty() {
            let length = (range.end - range.start).min(ZEROES_BYTES_MAX);
            let memory = ConstMemory::of(&zeroes[..length as usize]);
            let write = memory.write_request(range.start, request.flags() & !flag::MAY_UNMAP);
            next.write(&write.with_scope(request.scope())).await?;
            range.start += length;
        }
        Ok(())
    }

    /// A discard is a hint: it becomes nothing.
    async fn discard(&self, _: &mut Next<'_>, _: &DiscardRequest<'_>) -> Result<()> {
        Ok(())
    }

    /// Nothing is known about an extent but that it can be read: all data, here.
    async fn block_status(&self, _: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        request.answer(BlockStatus {
            flags: status::DATA,
            depth: 1,
            length: request.length(),
            ..Default::default()
        });
        Ok(())
    }

    /// A hint becomes nothing.
    async fn cache(&self, _: &mut Next<'_>, _: &CacheRequest<'_>) -> Result<()> {
        Ok(())
    }
}
