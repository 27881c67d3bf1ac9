//! Writing: every child gets it, and enough must have taken it.

use super::Quorum;
use driveline_op::{FlushRequest, Next, Result, WriteRequest, WriteZeroesRequest};

impl Quorum {
    pub(super) async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let range = request.range();
        let _hold = self.ranges.hold(range.clone(), true).await;
        let outcomes =
            Self::all(next, |child, mut next| async move { next.child(child).write(request).await }).await;
        self.judge(outcomes, "write", &range).inspect_err(|_| self.failed(&range))
    }

    pub(super) async fn write_zeroes(
        &self,
        next: &mut Next<'_>,
        request: &WriteZeroesRequest<'_>,
    ) -> Result<()> {
        let range = request.range();
        let _hold = self.ranges.hold(range.clone(), true).await;
        let outcomes =
            Self::all(next, |child, mut next| async move { next.child(child).write_zeroes(request).await })
                .await;
        self.judge(outcomes, "write", &range).inspect_err(|_| self.failed(&range))
    }

    pub(super) async fn flush(&self, next: &mut Next<'_>, _: &FlushRequest<'_>) -> Result<()> {
        let outcomes = Self::all(next, |child, mut next| async move { next.flush_at(child).await }).await;
        let all = 0..next.info(0).size_bytes;
        self.judge(outcomes, "flush", &all)
    }
}
