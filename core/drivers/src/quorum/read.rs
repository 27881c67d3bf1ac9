//! Reading: all children say what they have, and what most say counts; or the first one that can be read.

use super::{Quorum, ReadPattern};
use driveline_op::{
    BlockStatus, BlockStatusRequest, Buffer, ConstMemory, Error, Next, ReadRequest, Result, flag, status,
};

impl Quorum {
    pub(super) async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        match self.pattern {
            ReadPattern::Fifo => self.read_first(next, request).await,
            ReadPattern::Quorum => self.read_all(next, request).await,
        }
    }

    async fn read_first(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let mut last = Err(Error::IO);
        for child in 0..next.children() {
            last = next.child(child).read(request).await;
            match &last {
                Ok(()) => break,
                Err(error) => self.bad(child, "read", Some(error), &request.range()),
            }
        }
        last
    }

    async fn read_all(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let range = request.range();
        // Who is outvoted may be written to, which nobody else may do meanwhile.
        let rewrites = self.rewrites();
        let _hold = self.ranges.hold(range.clone(), rewrites).await;
        let length = (range.end - range.start) as usize;
        let mut answers: Vec<Buffer> = (0..next.children()).map(|_| Buffer::new(length)).collect();
        let outcomes = {
            let mut into = answers.iter_mut();
            Self::all(next, |child, mut next| {
                let into = into.next();
                let offset = range.start;
                async move {
                    match into {
                        Some(into) => next.read_at(child, offset, into).await,
                        None => Err(Error::IO),
                    }
                }
            })
            .await
        };
        let heard: Vec<usize> = (0..answers.len()).filter(|child| outcomes[*child].is_ok()).collect();
        if let Err(error) = self.judge(outcomes, "read", &range) {
            self.failed(&range);
            return Err(error);
        }
        let says = |of: usize| heard.iter().filter(|child| answers[**child][..] == answers[of][..]).count();
        // The first that the most say.
        let mut winner = (0, 0);
        for child in &heard {
            let votes = says(*child);
            if votes > winner.1 {
                winner = (*child, votes);
            }
            if votes * 2 > heard.len() {
                break;
            }
        }
        let (winner, votes) = winner;
        if votes < self.threshold {
            self.failed(&range);
            return Err(Error::IO);
        }
        if votes < heard.len() {
            for child in heard.iter().filter(|child| answers[**child][..] != answers[winner][..]) {
                self.bad(*child, "read", None, &range);
                if rewrites && let Err(error) = self.repair(next, *child, range.start, &answers[winner]).await
                {
                    self.bad(*child, "write", Some(&error), &range);
                }
            }
        }
        request.fill(0, &answers[winner]);
        Ok(())
    }

    /// Nothing changes for who reads the quorum; the child's own data do, and its bitmaps record that.
    async fn repair(&self, next: &mut Next<'_>, child: usize, offset: u64, data: &Buffer) -> Result<()> {
        let memory = ConstMemory::of(data);
        let write = memory.write_request(offset, flag::UNCHANGED).with_scope(self.cookie);
        next.child(child).write(&write).await
    }

    /// What reads as zeroes for all children, as far as they agree. All else counts as data: a vote may go to who has some, and
    /// with `fifo` there is none.
    pub(super) async fn block_status(
        &self,
        next: &mut Next<'_>,
        request: &BlockStatusRequest<'_>,
    ) -> Result<()> {
        let range = request.range();
        let (mut zeroes, mut length) = (0, range.end - range.start);
        for child in 0..next.children() {
            let Ok(found) = next.status_at(child, range.clone()).await else { continue };
            length = length.min(found.length.max(1));
            zeroes += usize::from(found.flags & status::ZERO != 0);
        }
        let flags = if zeroes == next.children() { status::ZERO } else { status::DATA };
        request.answer(BlockStatus { flags, depth: 1, length, ..BlockStatus::default() });
        Ok(())
    }
}
