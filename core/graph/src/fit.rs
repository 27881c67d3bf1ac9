//! Requests made to fit a node: aligned by read-modify-write, and split to the length that it takes.

use driveline_op::{
    BlockStatus, BlockStatusRequest, Buffer, ConstMemory, DiscardRequest, Error, Info, Memory, Next,
    ReadRequest, Result, WriteRequest, WriteZeroesRequest, flag,
};
use std::ops::Range;

/// A node's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fit {
    alignment: u64,
    /// A multiple of the alignment.
    transfer_max: u64,
    /// Where the node ends, if it has one end: a block at it that is not whole is read as far as it goes.
    end: u64,
}

impl Fit {
    /// The limits of a node, if it has any. One that `grows` takes what lies behind its end.
    pub(crate) fn of(info: &Info, grows: bool) -> Option<Self> {
        let alignment = u64::from(info.request_alignment.max(1));
        let limit = if info.transfer_bytes_max == 0 { u64::MAX } else { info.transfer_bytes_max };
        let transfer_max = (limit / alignment).max(1).saturating_mul(alignment);
        let fit = Self { alignment, transfer_max, end: if grows { u64::MAX } else { info.size_bytes } };
        (alignment > 1 || info.transfer_bytes_max > 0).then_some(fit)
    }

    /// So much there is of the block at that offset.
    fn there(&self, block: u64) -> usize {
        self.end.saturating_sub(block).min(self.alignment) as usize
    }

    /// The blocks that a range touches.
    pub(crate) fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        self.down(range.start)..self.up(range.end)
    }

    fn down(&self, offset: u64) -> u64 {
        offset / self.alignment * self.alignment
    }

    fn up(&self, offset: u64) -> u64 {
        offset.div_ceil(self.alignment) * self.alignment
    }

    /// The range as a head in one block, whole blocks, and a tail in one block. Empty where there is none.
    fn pieces(&self, range: &Range<u64>) -> [Range<u64>; 3] {
        let (first, last) = (self.up(range.start), self.down(range.end));
        if first > last {
            return [range.clone(), range.end..range.end, range.end..range.end]; // inside one block
        }
        [range.start..first, first..last, last..range.end]
    }

    pub(crate) async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let range = request.range();
        let [head, middle, tail] = self.pieces(&range);
        for edge in [head, tail] {
            if !edge.is_empty() {
                let mut block = self.read_block(next, &edge).await?;
                let at = (edge.start % self.alignment) as usize;
                request.fill(edge.start - range.start, &block[at..at + (edge.end - edge.start) as usize]);
                block.set_len(0);
            }
        }
        let mut at = middle.start;
        while at < middle.end {
            let end = middle.end.min(at.saturating_add(self.transfer_max));
            if (at..end) == range {
                return next.read(request).await;
            }
            let part = request.part(at - range.start..end - range.start);
            next.read(&part.read_request(at)).await?;
            at = end;
        }
        Ok(())
    }

    pub(crate) async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let range = request.range();
        let [head, middle, tail] = self.pieces(&range);
        for edge in [head, tail] {
            if !edge.is_empty() {
                let mut block = self.read_block(next, &edge).await?;
                let at = (edge.start % self.alignment) as usize;
                request
                    .copy_to(edge.start - range.start, &mut block[at..at + (edge.end - edge.start) as usize]);
                let memory = ConstMemory::of(&block[..self.there(self.down(edge.start))]);
                let whole = memory.write_request(self.down(edge.start), request.flags());
                next.write(&whole.with_scope(request.scope())).await?;
            }
        }
        let mut at = middle.start;
        while at < middle.end {
            let end = middle.end.min(at.saturating_add(self.transfer_max));
            if (at..end) == range {
                return next.write(request).await;
            }
            let part = request.part(at - range.start..end - range.start);
            next.write(&part.write_request(at, request.flags()).with_scope(request.scope())).await?;
            at = end;
        }
        Ok(())
    }

    pub(crate) async fn write_zeroes(
        &self,
        next: &mut Next<'_>,
        request: &WriteZeroesRequest<'_>,
    ) -> Result<()> {
        let range = request.range();
        let [head, middle, tail] = self.pieces(&range);
        let aligned = head.is_empty() && tail.is_empty();
        if !aligned && request.flags() & flag::NO_FALLBACK != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        for edge in [head, tail] {
            if !edge.is_empty() {
                let mut block = self.read_block(next, &edge).await?;
                let at = (edge.start % self.alignment) as usize;
                block[at..at + (edge.end - edge.start) as usize].fill(0);
                let memory = ConstMemory::of(&block[..self.there(self.down(edge.start))]);
                let flags = request.flags() & (flag::FUA | flag::UNCHANGED);
                let whole = memory.write_request(self.down(edge.start), flags);
                next.write(&whole.with_scope(request.scope())).await?;
            }
        }
        if middle.is_empty() {
            return Ok(());
        }
        // Zeroes take no memory, so the transfer limit is not theirs.
        next.write_zeroes(&WriteZeroesRequest::new(middle, request.flags()).with_scope(request.scope())).await
    }

    /// Only whole blocks can be given up.
    pub(crate) async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        let [_, middle, _] = self.pieces(&request.range());
        if middle.is_empty() {
            return Ok(());
        }
        next.discard(&DiscardRequest::new(middle, request.flags()).with_scope(request.scope())).await
    }

    pub(crate) async fn block_status(
        &self,
        next: &mut Next<'_>,
        request: &BlockStatusRequest<'_>,
    ) -> Result<()> {
        let mut blocks = self.blocks(&request.range());
        blocks.end = blocks.end.min(self.end.max(request.range().end));
        let skip = request.offset() - blocks.start;
        let found = next.status_with(0, blocks, request.flags()).await?;
        let map = if found.flags & driveline_op::status::MAPPED != 0 { found.map + skip } else { 0 };
        // An extent of whole blocks covers at least the first byte asked for.
        request.answer(BlockStatus { length: found.length.saturating_sub(skip).max(1), map, ..found });
        Ok(())
    }

    /// The block around a range; what is not there of it is zeroes.
    async fn read_block(&self, next: &mut Next<'_>, inside: &Range<u64>) -> Result<Buffer> {
        let mut block = Buffer::new(self.alignment as usize);
        let start = self.down(inside.start);
        let memory = Memory::of_mut(&mut block[..self.there(start)]);
        next.read(&memory.read_request(start)).await?;
        drop(memory);
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_head_whole_blocks_and_tail() {
        let fit = Fit { alignment: 512, transfer_max: u64::MAX, end: u64::MAX };
        let pieces = |range| fit.pieces(&range).map(|r| (r.start, r.end));
        assert_eq!(pieces(0..1024), [(0, 0), (0, 1024), (1024, 1024)]);
        assert_eq!(pieces(10..1034), [(10, 512), (512, 1024), (1024, 1034)]);
        assert_eq!(pieces(10..20), [(10, 20), (20, 20), (20, 20)]);
        assert_eq!(pieces(500..520), [(500, 512), (512, 512), (512, 520)]);
    }
}
