//! The operation protocol, in one process: inline, waiting, cancelled, panicking, several at a time.

use driveline_op::*;
use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};

/// A leaf that takes its time: it is pending so many polls, and counts what is under way.
#[derive(Default)]
struct Slow {
    polls: usize,
    live: Arc<AtomicUsize>,
    log: Arc<Mutex<Vec<(u64, u64)>>>,
}

struct Live(Arc<AtomicUsize>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

async fn wait(polls: usize) {
    let mut left = polls;
    std::future::poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        let owned = cx.waker().clone(); // as a reactor has one
        owned.wake();
        Poll::Pending
    })
    .await;
}

impl Slow {
    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.live.fetch_add(1, SeqCst);
        let _live = Live(self.live.clone());
        wait(self.polls).await;
        self.log.lock().unwrap().push((request.offset(), request.length()));
        let data: Vec<u8> = request.range().map(|at| at as u8).collect();
        request.fill(0, &data);
        Ok(())
    }
    async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        wait(self.polls).await;
        let mut data = vec![0; request.length() as usize];
        request.copy_to(0, &mut data);
        let expected: Vec<u8> = request.range().map(|at| at as u8).collect();
        if data == expected { Ok(()) } else { Err(Error::invalid("not what this leaf is written with")) }
    }
}

static SLOW: OpTable<Slow> = OpTable::new().read(Slow::read).write(Slow::write);

/// What a filter does with a read.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    Pass,
    Halves,
    HalvesAtOnce,
    PanicBefore,
    PanicAfter,
    PanicInDrop,
    GiveUp,
    Own,
}

struct Filter(Does);
static FILTER: OpTable<Filter> = OpTable::new().read(Filter::read);

struct Bomb;
impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("in drop");
    }
}

impl Filter {
    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let half = request.length() / 2;
        match self.0 {
            Does::Pass => next.read(request).await,
            Does::Halves => {
                let (low, high) = (request.part(0..half), request.part(half..request.length()));
                next.read(&low.read_request(request.offset())).await?;
                next.read(&high.read_request(request.offset() + half)).await
            }
            Does::HalvesAtOnce => {
                let (low, high) = (request.part(0..half), request.part(half..request.length()));
                let (low, high) =
                    (low.read_request(request.offset()), high.read_request(request.offset() + half));
                let (mut a, mut b) = (next.fork(), next.fork());
                let (mut a, mut b) = (Box::pin(a.read(&low)), Box::pin(b.read(&high)));
                let mut done = (None, None);
                std::future::poll_fn(|cx| {
                    if done.0.is_none()
                        && let Poll::Ready(r) = a.as_mut().poll(cx)
                    {
                        done.0 = Some(r);
                    }
                    if done.1.is_none()
                        && let Poll::Ready(r) = b.as_mut().poll(cx)
                    {
                        done.1 = Some(r);
                    }
                    if done.0.is_some() && done.1.is_some() { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
                done.0.unwrap().and(done.1.unwrap())
            }
            Does::PanicBefore => panic!("before"),
            Does::PanicAfter => {
                next.read(request).await?;
                panic!("after")
            }
            Does::PanicInDrop => {
                let _bomb = Bomb;
                next.read(request).await
            }
            Does::GiveUp => {
                let mut call = Box::pin(next.read(request));
                std::future::poll_fn(|cx| {
                    let _ = call.as_mut().poll(cx);
                    Poll::Ready(())
                })
                .await;
                drop(call);
                Err(Error::errno(110))
            }
            Does::Own => {
                let mut mine = vec![0; request.length() as usize];
                next.read_at(0, request.offset(), &mut mine).await?;
                request.fill(0, &mine);
                Ok(())
            }
        }
    }
}

struct World {
    edge: Edge,
    live: Arc<AtomicUsize>,
    log: Arc<Mutex<Vec<(u64, u64)>>>,
}

fn world(does: &[Does], polls: usize) -> World {
    let slow = Slow { polls, ..Slow::default() };
    let (live, log) = (slow.live.clone(), slow.log.clone());
    let info = Info { size_bytes: 1 << 30, ..Info::default() };
    let leaf = Instance::new(Arc::new(Body { cookie: 1, driver: slow }), &SLOW);
    let mut edge = Edge::to(info, &Target::new(leaf, vec![]));
    for does in does {
        let filter = Instance::new(Arc::new(Body { cookie: 2, driver: Filter(*does) }), &FILTER);
        let target = Target::new(filter, vec![edge.clone()]);
        edge = Edge::new(
            info,
            |op| if target.instance().has(op) { Route::To(&target) } else { Route::As(&edge) },
        );
    }
    World { edge, live, log }
}

struct Count(AtomicUsize);
impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

fn read(world: &World, polls_max: usize) -> Option<Answer> {
    let ask = Ask { op: op::READ, offset: 1000, ..Ask::default() };
    let mut call = Box::pin(Call::new(world.edge.clone(), ask, Buffer::new(64)));
    let wakes = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(wakes.clone());
    for poll in 0..polls_max {
        assert!(poll == 0 || wakes.0.load(SeqCst) > 0, "a pending request wakes its task");
        if let Poll::Ready(answer) = Pin::as_mut(&mut call).poll(&mut Context::from_waker(&waker)) {
            return Some(answer);
        }
    }
    None
}

fn is_right(answer: &Answer) -> bool {
    answer.buffer.iter().enumerate().all(|(at, byte)| *byte == (1000 + at) as u8)
}

#[test]
fn reads_come_back_whole_inline_and_later_through_any_stack() {
    for polls in [0, 1, 5] {
        for stack in [
            vec![],
            vec![Does::Pass; 40],
            vec![Does::Halves; 4],
            vec![Does::HalvesAtOnce; 4],
            vec![Does::Own, Does::Pass, Does::HalvesAtOnce, Does::Halves],
        ] {
            let world = world(&stack, polls);
            let answer = read(&world, 10_000).expect("it ends");
            assert!(answer.result.is_ok() && is_right(&answer), "{stack:?} after {polls}");
            assert_eq!(world.live.load(SeqCst), 0);
        }
    }
}

#[test]
fn a_panic_anywhere_is_an_io_error_and_leaves_nothing_under_way() {
    std::panic::set_hook(Box::new(|_| {}));
    for polls in [0, 2] {
        for does in [Does::PanicBefore, Does::PanicAfter, Does::PanicInDrop] {
            let world = world(&[Does::Pass, does, Does::Pass], polls);
            let answer = read(&world, 100).expect("it ends");
            assert_eq!(answer.result.unwrap_err().code(), 5, "{does:?}");
            assert_eq!((answer.buffer.len(), world.live.load(SeqCst)), (64, 0), "{does:?}");
        }
    }
    let _ = std::panic::take_hook();
}

#[test]
fn cancelled_requests_end_all_that_is_below() {
    for stack in [vec![Does::Pass; 3], vec![Does::HalvesAtOnce, Does::Pass], vec![Does::Own]] {
        let world = world(&stack, 3);
        assert!(read(&world, 2).is_none(), "still waiting when it is dropped");
        assert_eq!((world.live.load(SeqCst), world.log.lock().unwrap().len()), (0, 0), "{stack:?}");
    }
    let world = world(&[Does::GiveUp], 3);
    assert_eq!(read(&world, 10).unwrap().result.unwrap_err().code(), 110);
    assert_eq!(world.live.load(SeqCst), 0, "a call that a filter gives up is cancelled");
}

#[test]
fn what_is_not_there_is_refused() {
    let world = world(&[Does::Pass], 0);
    for op in [op::FLUSH, op::WRITE_ZEROES, 99] {
        let ask = Ask { op, ..Ask::default() };
        let call = std::pin::pin!(Call::new(world.edge.clone(), ask, Buffer::default()));
        let Poll::Ready(answer) = call.poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("it waits")
        };
        assert_eq!(answer.result.unwrap_err().code(), 95);
    }
}

#[test]
fn parts_of_scattered_memory_are_the_right_bytes() {
    let mut pieces: Vec<Vec<u8>> = [3usize, 0, 5, 1, 7].iter().map(|len| vec![0; *len]).collect();
    let mut memory = Memory::empty();
    for piece in &mut pieces {
        memory.push(Memory::of_mut(piece));
    }
    let request = memory.read_request(0);
    let data: Vec<u8> = (1..=16).collect();
    for start in 0..=16u64 {
        for end in start..=16 {
            request.part(start..end).read_request(7).fill(0, &data[start as usize..end as usize]);
        }
    }
    drop(memory);
    assert_eq!(pieces.concat(), data);
}

#[test]
fn a_buffer_is_aligned_and_keeps_its_memory() {
    let mut buffer = Buffer::new(10_000);
    let base = buffer.as_ptr();
    assert_eq!(base as usize % BUFFER_ALIGNMENT, 0);
    buffer.set_len(100);
    buffer.set_len(10_000);
    assert_eq!((buffer.as_ptr(), buffer.len(), buffer.capacity()), (base, 10_000, 10_000));
    buffer.set_len(20_000);
    assert!(buffer.iter().all(|byte| *byte == 0));
}
