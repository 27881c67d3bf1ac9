//! Lower, never bypass: an operation that a node does not know arrives as ones that it knows, or not at all.

use driveline_op::{
    BlockStatus, BlockStatusRequest, Buffer, CacheRequest, ConstMemory, DiscardRequest, Error, Next, OpTable,
    Result, WriteZeroesRequest, flag, status,
};

/// Stands before a node; child 0 is the node, by the operations that it has.
pub(crate) struct Lower;

pub(crate) static LOWER: OpTable<Lower> = OpTable::new()
    .discard(Lower::discard)
    .write_zeroes(Lower::write_zeroes)
    .block_status(Lower::block_status)
    .cache(Lower::cache);

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
