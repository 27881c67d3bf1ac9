//! The random operations, and what must hold after each.

use super::{model::Model, scatter::scattered};
use driveline_op::{Answer, Ask, BlockStatus, Buffer, Call, Edge, Info, flag, info, op, status};
use futures::future::join_all;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::ops::Range;

/// `ENOTSUP`: the one error that an operation may have without being broken, where the contract says so.
const NOT_SUPPORTED: i32 = 95;

/// How much to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Where the random choices begin. The same seed makes the same choices.
    pub seed: u64,
    /// How many random operations.
    pub steps: usize,
    /// How much of the node is used, from its beginning; no more than it has. The rest is looked at neither.
    pub size_bytes_max: u64,
    /// The longest request.
    pub length_bytes_max: u64,
    /// Requests at the same time, in the steps that do several.
    pub concurrency: usize,
}

impl Default for Check {
    fn default() -> Self {
        Self { seed: 0, steps: 400, size_bytes_max: 4 << 20, length_bytes_max: 192 << 10, concurrency: 8 }
    }
}

/// Checks a node through an edge, once plainly and once with scattered memory. Its content is overwritten.
pub async fn check(edge: &Edge, check: Check) {
    for edge in [edge.clone(), scattered(edge)] {
        check_with(*edge.info(), check, async |ask, buffer| Call::new(edge.clone(), ask, buffer).await).await;
    }
}

/// Checks a node through anything that runs requests.
pub async fn check_with(info: Info, check: Check, run: impl AsyncFn(Ask, Buffer) -> Answer) {
    let size = info.size_bytes.min(check.size_bytes_max);
    let align = u64::from(info.request_alignment);
    let size = size / align * align;
    assert!(size > 0, "a node to check has a size");
    assert_eq!(info.flags & info::READ_ONLY, 0, "a node to check is writable");
    let model = Model::new(usize::try_from(size).expect("a node to check fits into memory"));
    let random = StdRng::seed_from_u64(check.seed);
    let mut suite = Suite { check, info, size, align, run, model, random, trail: Vec::new() };
    suite.first_contact().await;
    suite.nothing_is_always_done().await;
    suite.the_ends().await;
    for _ in 0..check.steps {
        suite.step().await;
    }
    suite.beyond_the_end().await;
    suite.everything().await;
}

struct Suite<F> {
    check: Check,
    info: Info,
    size: u64,
    align: u64,
    run: F,
    model: Model,
    random: StdRng,
    /// The last operations, for the report.
    trail: Vec<String>,
}

impl<F: AsyncFn(Ask, Buffer) -> Answer> Suite<F> {
    #[track_caller]
    fn broken(&self, what: &str) -> ! {
        let last = self.trail.iter().rev().take(12).rev().cloned().collect::<Vec<_>>().join("\n  ");
        panic!("seed {}: {what}\nlast operations:\n  {last}\n{:?}", self.check.seed, self.info)
    }

    async fn ask(&mut self, op: u32, range: Range<u64>, flags: u32, data: Buffer) -> Answer {
        let (offset, length) = (range.start, range.end - range.start);
        self.trail.push(format!("{} {range:?} flags {flags:#x}", op::NAMES[op as usize]));
        let answer = (self.run)(Ask { op, flags, offset, length, ..Ask::default() }, data).await;
        if let Err(error) = &answer.result {
            self.trail.last_mut().expect("just pushed").push_str(&format!(" -> {error}"));
        }
        answer
    }

    /// Runs what must succeed.
    async fn must(&mut self, op: u32, range: Range<u64>, flags: u32, data: Buffer) -> Answer {
        let answer = self.ask(op, range, flags, data).await;
        if let Err(error) = &answer.result {
            self.broken(&format!("an operation that must succeed failed: {error}"));
        }
        answer
    }

    fn any_range(&mut self) -> Range<u64> {
        let places = self.size / self.align;
        let longest = match self.random.random_range(0..4) {
            0 => 1,
            1 => 8192 / self.align,
            _ => self.check.length_bytes_max / self.align,
        };
        let length = self.random.random_range(1..=longest.clamp(1, places));
        let start = match self.random.random_range(0..8) {
            0 => 0,
            1 => places - length,
            _ => self.random.random_range(0..=places - length),
        };
        let longest = match self.info.transfer_bytes_max {
            0 => u64::MAX,
            limit => (limit / self.align * self.align).max(self.align),
        };
        start * self.align..start * self.align + (length * self.align).min(longest)
    }

    fn any_data(&mut self, length: u64) -> Buffer {
        let mut data = Buffer::new(length as usize);
        match self.random.random_range(0..8) {
            0 => {}
            1 => data.fill(self.random.random()),
            _ => self.random.fill(&mut data[..]),
        }
        data
    }

    fn flags(&mut self, of: &[u32]) -> u32 {
        of.iter().filter(|_| self.random.random_ratio(1, 4)).fold(0, |all, one| all | one)
    }

    /// What the node holds at first is read once; from then on it must not change by itself.
    async fn first_contact(&mut self) {
        self.everything().await;
    }

    async fn everything(&mut self) {
        let step = (1 << 20) / self.align * self.align;
        let limit = self.info.transfer_bytes_max / self.align * self.align;
        let step = if limit > 0 { step.min(limit) } else { step };
        let mut at = 0;
        while at < self.size {
            let end = (at + step).min(self.size);
            self.read(at..end).await;
            at = end;
        }
        self.statuses(0..self.size).await;
    }

    async fn nothing_is_always_done(&mut self) {
        for at in [0, self.size / self.align / 2 * self.align, self.size] {
            for op in [op::READ, op::WRITE, op::WRITE_ZEROES] {
                self.must(op, at..at, 0, Buffer::default()).await;
            }
            for op in [op::DISCARD, op::CACHE] {
                let answer = self.ask(op, at..at, 0, Buffer::default()).await;
                self.supported(&answer);
            }
        }
        self.must(op::FLUSH, 0..0, 0, Buffer::default()).await;
    }

    async fn the_ends(&mut self) {
        for start in [0, self.size - self.align] {
            let range = start..start + self.align;
            let data = Buffer::from(&vec![0x5a; self.align as usize][..]);
            self.write(range.clone(), data, 0).await;
            self.read(range.clone()).await;
            self.zero(range.clone(), 0).await;
            self.read(range).await;
        }
    }

    /// Reads that are not inside the node fail, or read zeroes there (as files do); nothing else happens.
    async fn beyond_the_end(&mut self) {
        if self.size != self.info.size_bytes {
            return;
        }
        for range in [self.size - self.align..self.size + self.align, self.size..self.size + 2 * self.align] {
            let inside = (self.size - range.start) as usize;
            let mut data = Buffer::new((range.end - range.start) as usize);
            data.fill(0xee);
            let answer = self.ask(op::READ, range.clone(), 0, data).await;
            if answer.result.is_ok() {
                if answer.buffer[inside..].iter().any(|byte| *byte != 0) {
                    self.broken("a read beyond the end found something");
                }
                if self.model.compare(range.start as usize, &answer.buffer[..inside]).is_some() {
                    self.broken("a read across the end found other data than was written");
                }
            }
        }
    }

    async fn step(&mut self) {
        let range = self.any_range();
        match self.random.random_range(0..20) {
            0..5 => self.read(range).await,
            5..10 => {
                let data = self.any_data(range.end - range.start);
                let flags = self.flags(&[flag::FUA, flag::UNCHANGED]);
                self.write(range, data, flags).await;
            }
            10..13 => {
                let flags = self.flags(&[flag::FUA, flag::MAY_UNMAP, flag::NO_FALLBACK]);
                self.zero(range, flags).await;
            }
            13 => {
                let flags = self.flags(&[flag::FUA]);
                self.discard(range, flags).await;
            }
            14..16 => self.statuses(range).await,
            16 => drop(self.must(op::FLUSH, 0..0, 0, Buffer::default()).await),
            17 => {
                let answer = self.ask(op::CACHE, range, 0, Buffer::default()).await;
                self.supported(&answer);
            }
            _ => self.several().await,
        }
    }

    async fn read(&mut self, range: Range<u64>) {
        let mut data = Buffer::new((range.end - range.start) as usize);
        data.fill(0xee);
        let answer = self.must(op::READ, range.clone(), 0, data).await;
        self.compare(&range, &answer.buffer);
    }

    fn compare(&mut self, range: &Range<u64>, found: &[u8]) {
        if let Some(at) = self.model.compare(range.start as usize, found) {
            let (want, have) = (self.model.byte(at), found[at - range.start as usize]);
            self.broken(&format!("byte {at} reads as {have:#04x} instead of {want:#04x}"));
        }
    }

    async fn write(&mut self, range: Range<u64>, data: Buffer, flags: u32) {
        let copy = data.to_vec();
        let answer = self.must(op::WRITE, range.clone(), flags, data).await;
        self.stored(&range, &copy, &answer);
        self.beside(range).await;
    }

    fn stored(&mut self, range: &Range<u64>, data: &[u8], answer: &Answer) {
        if *answer.buffer != *data {
            self.broken(&format!("the write of {range:?} changed the memory that it was lent"));
        }
        self.model.write(range.start as usize, data);
    }

    async fn zero(&mut self, range: Range<u64>, flags: u32) {
        let answer = self.ask(op::WRITE_ZEROES, range.clone(), flags, Buffer::default()).await;
        match &answer.result {
            Ok(()) => self.model.zero(range.start as usize..range.end as usize),
            // It was asked to refuse rather than to be slow; then nothing has changed.
            Err(error) if flags & flag::NO_FALLBACK != 0 && error.code() == NOT_SUPPORTED => {}
            Err(error) => {
                let text = format!("write_zeroes failed: {error}");
                self.broken(&text);
            }
        }
        self.read(range.clone()).await;
        self.beside(range).await;
    }

    async fn discard(&mut self, range: Range<u64>, flags: u32) {
        let answer = self.ask(op::DISCARD, range.clone(), flags, Buffer::default()).await;
        self.supported(&answer);
        if answer.result.is_ok() {
            self.model.forget(range.start as usize..range.end as usize);
        }
        self.beside(range).await;
    }

    fn supported(&self, answer: &Answer) {
        match &answer.result {
            Err(error) if error.code() != NOT_SUPPORTED => self.broken(&format!("a hint failed: {error}")),
            _ => {}
        }
    }

    /// What lies on both sides of a range is as it was.
    async fn beside(&mut self, range: Range<u64>) {
        if range.start >= self.align {
            self.read(range.start - self.align..range.start).await;
        }
        if range.end + self.align <= self.size {
            self.read(range.end..range.end + self.align).await;
        }
    }

    /// The extents of a range cover it and tell the truth.
    async fn statuses(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let answer = self.ask(op::BLOCK_STATUS, at..range.end, 0, Buffer::default()).await;
            match &answer.result {
                Ok(()) => {}
                Err(error) if error.code() == NOT_SUPPORTED => return,
                Err(error) => {
                    let text = format!("block_status failed: {error}");
                    self.broken(&text);
                }
            }
            let extent = answer.status;
            self.extent(at, range.end - at, extent);
            at += extent.length;
        }
    }

    fn extent(&mut self, at: u64, length: u64, extent: BlockStatus) {
        let BlockStatus { flags, depth, .. } = extent;
        if extent.length == 0 || extent.length > length {
            self.broken(&format!("the extent at {at} does not lie in the range asked for: {extent:?}"));
        }
        if !extent.length.is_multiple_of(self.align) {
            self.broken(&format!("the extent at {at} is not aligned: {extent:?}"));
        }
        if depth == 0 && flags & status::DATA != 0 {
            self.broken(&format!("the extent at {at} has data, but in no layer: {extent:?}"));
        }
        let zero = flags & status::ZERO != 0 || depth == 0;
        if zero && self.model.surely_not_zero(at as usize..(at + extent.length) as usize) {
            self.broken(&format!("the extent at {at} claims to be zero and is not: {extent:?}"));
        }
    }

    /// Disjoint requests at the same time.
    async fn several(&mut self) {
        let count = self.check.concurrency.max(1) as u64;
        let share = self.size / self.align / count * self.align;
        if share == 0 {
            return;
        }
        let longest = self.check.length_bytes_max.min(share);
        let mut jobs = Vec::new();
        for number in 0..count {
            let length = self.random.random_range(1..=longest / self.align) * self.align;
            let length = match self.info.transfer_bytes_max / self.align * self.align {
                0 => length,
                limit => length.min(limit),
            };
            let slack = (share - length) / self.align;
            let start = number * share + self.random.random_range(0..=slack) * self.align;
            let which = [op::READ, op::WRITE, op::WRITE, op::WRITE_ZEROES, op::FLUSH];
            let op = which[self.random.random_range(0..which.len())];
            let data = match op {
                op::READ => Buffer::new(length as usize),
                op::WRITE => self.any_data(length),
                _ => Buffer::default(),
            };
            let length = if op == op::FLUSH { 0 } else { length };
            let offset = if op == op::FLUSH { 0 } else { start };
            self.trail.push(format!("together: {} {offset}+{length}", op::NAMES[op as usize]));
            jobs.push((Ask { op, offset, length, ..Ask::default() }, data));
        }
        let run = &self.run;
        let copies: Vec<Vec<u8>> = jobs.iter().map(|(_, data)| data.to_vec()).collect();
        let done: Vec<(Ask, Answer)> =
            join_all(jobs.into_iter().map(async |(ask, data)| (ask, run(ask, data).await))).await;
        let mut touched = Vec::new();
        for ((ask, answer), copy) in done.into_iter().zip(copies) {
            if let Err(error) = &answer.result {
                let text = format!("one of several failed: {error} ({ask:?})");
                self.broken(&text);
            }
            let range = ask.offset..ask.offset + ask.length;
            match ask.op {
                op::READ => self.compare(&range, &answer.buffer),
                op::WRITE => self.stored(&range, &copy, &answer),
                op::WRITE_ZEROES => self.model.zero(range.start as usize..range.end as usize),
                _ => continue,
            }
            touched.push(range);
        }
        for range in touched {
            self.read(range).await;
        }
    }
}
