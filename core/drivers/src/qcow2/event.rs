//! What those below are told before it is done: for tests that let it fail there.
//!
//! Each constant stands where QEMU's qcow2 does the same; what it does and we do not has none.
//! Source: QEMU qapi/block-core.json, `BlkdebugEvent`, and its uses in block/qcow2*.c.

use super::io::Io;
use driveline_op::event::number;

pub(crate) const NONE: u64 = number("none");
pub(crate) const L1_UPDATE: u64 = number("l1_update");
pub(crate) const L1_GROW_ALLOC_TABLE: u64 = number("l1_grow_alloc_table");
pub(crate) const L1_GROW_WRITE_TABLE: u64 = number("l1_grow_write_table");
pub(crate) const L1_GROW_ACTIVATE_TABLE: u64 = number("l1_grow_activate_table");
pub(crate) const L2_LOAD: u64 = number("l2_load");
pub(crate) const L2_UPDATE: u64 = number("l2_update");
pub(crate) const L2_UPDATE_COMPRESSED: u64 = number("l2_update_compressed");
pub(crate) const L2_ALLOC_COW_READ: u64 = number("l2_alloc_cow_read");
pub(crate) const L2_ALLOC_WRITE: u64 = number("l2_alloc_write");
pub(crate) const READ_AIO: u64 = number("read_aio");
pub(crate) const READ_BACKING_AIO: u64 = number("read_backing_aio");
pub(crate) const READ_COMPRESSED: u64 = number("read_compressed");
pub(crate) const WRITE_AIO: u64 = number("write_aio");
pub(crate) const WRITE_COMPRESSED: u64 = number("write_compressed");
pub(crate) const COW_READ: u64 = number("cow_read");
pub(crate) const COW_WRITE: u64 = number("cow_write");
pub(crate) const REFTABLE_LOAD: u64 = number("reftable_load");
pub(crate) const REFTABLE_GROW: u64 = number("reftable_grow");
pub(crate) const REFBLOCK_LOAD: u64 = number("refblock_load");
pub(crate) const REFBLOCK_UPDATE_PART: u64 = number("refblock_update_part");
pub(crate) const REFBLOCK_ALLOC: u64 = number("refblock_alloc");
pub(crate) const REFBLOCK_ALLOC_HOOKUP: u64 = number("refblock_alloc_hookup");
pub(crate) const REFBLOCK_ALLOC_WRITE: u64 = number("refblock_alloc_write");
pub(crate) const REFBLOCK_ALLOC_WRITE_BLOCKS: u64 = number("refblock_alloc_write_blocks");
pub(crate) const REFBLOCK_ALLOC_WRITE_TABLE: u64 = number("refblock_alloc_write_table");
pub(crate) const REFBLOCK_ALLOC_SWITCH_TABLE: u64 = number("refblock_alloc_switch_table");
pub(crate) const CLUSTER_ALLOC: u64 = number("cluster_alloc");
pub(crate) const CLUSTER_FREE: u64 = number("cluster_free");

impl Io<'_, '_> {
    /// Tells a child what is about to happen. Nearly always nobody listens, and it is a look at two words.
    #[inline]
    pub(crate) async fn tell(&mut self, child: usize, event: u64) {
        if self.listens(child) {
            Box::pin(self.tell_listener(child, event)).await;
        }
    }
}
