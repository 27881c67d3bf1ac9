//! Those who share limits, and whose turn it is.
//!
//! Limits change while requests wait: they are under the same lock as who waits, and everybody is woken to look again.

use crate::{
    bucket::Bucket,
    limits::{Direction, Limits},
};
use driveline_sdk::{Error, Result, Sleep, now, sleep_until};
use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

/// The groups that have a name and a member.
static NAMED: LazyLock<Mutex<HashMap<String, Weak<Group>>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Limits, and the requests that wait for them.
///
/// Requests wait in *flows*, one for each member and direction, each in the order of arrival. The flows take turns, so
/// a member with many requests takes nothing from one with few.
#[derive(Debug)]
pub(crate) struct Group {
    /// Bit by direction: might a request have to wait? So that those without a limit need no lock.
    limited: AtomicU8,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` until a member gives limits.
    limits: Option<Limits>,
    /// In all, reads, writes.
    operations: [Bucket; 3],
    /// In all, reads, writes.
    bytes: [Bucket; 3],
    /// When the buckets were looked at last.
    leaked_at: Duration,
    /// Members that are drained, each as often as it is: they do not wait.
    drained: Vec<u64>,
    /// Those with waiting requests; the first is the one whose turn it is.
    flows: VecDeque<Flow>,
    last_id: u64,
}

#[derive(Debug)]
struct Flow {
    member: u64,
    direction: Direction,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    length_bytes: u64,
    waker: Waker,
}

/// A node that takes part in a group.
#[derive(Debug)]
pub(crate) struct Member {
    group: Arc<Group>,
    id: u64,
}

impl Group {
    /// How many users it has: members, and the object that it may be.
    pub(crate) fn users(self: &Arc<Self>) -> usize {
        Arc::strong_count(self)
    }

    pub(crate) fn limits(&self) -> Limits {
        lock(&self.state).limits.clone().unwrap_or_default()
    }

    /// Other limits, for those who wait too. What was used up before counts no more.
    pub(crate) fn change_limits(&self, limits: Limits) {
        let mut state = lock(&self.state);
        self.put(&mut state, limits);
        let woken: Vec<Waker> = state
            .flows
            .iter()
            .filter_map(|flow| flow.waiting.front())
            .map(|first| first.waker.clone())
            .collect();
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }
}

impl Member {
    /// Joins the group of that name, or one of its own. Limits that are given are those of the group from then on,
    /// and must be the same as those that another member gave.
    pub(crate) fn join(name: Option<&str>, limits: Option<Limits>) -> Result<Self> {
        let group = match name {
            None => Arc::default(),
            Some(name) => {
                let mut named = lock(&NAMED);
                named.retain(|_, group| group.strong_count() > 0);
                let known = named.get(name).and_then(Weak::upgrade);
                known.unwrap_or_else(|| {
                    let group = Arc::default();
                    named.insert(name.to_owned(), Arc::downgrade(&group));
                    group
                })
            }
        };
        if let Some(limits) = limits {
            group.set_limits(limits)?;
        }
        let id = lock(&group.state).new_id();
        Ok(Self { group, id })
    }

    /// Joins a group that is there, whose limits are not the member's business.
    pub(crate) fn join_object(group: Arc<Group>) -> Self {
        let id = lock(&group.state).new_id();
        Self { group, id }
    }

    /// A drain of the member's node begins or ends. Meanwhile its requests pass at once; they count all the same, so those who come
    /// later pay for them.
    pub(crate) fn set_drained(&self, drained: bool) {
        let mut state = lock(&self.group.state);
        if !drained {
            if let Some(at) = state.drained.iter().position(|member| *member == self.id) {
                state.drained.swap_remove(at);
            }
            return;
        }
        state.drained.push(self.id);
        let woken = state.let_go(self.id);
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }

    /// The wait for a request's turn, or `None` when it need not wait. `length_bytes`: those that it transfers.
    ///
    /// Without limits this is a load. Only a wait takes memory, so that requests which have none stay small.
    #[inline]
    pub(crate) fn turn(&self, direction: Direction, length_bytes: u64) -> Option<Pin<Box<Passing<'_>>>> {
        if self.group.limited.load(Relaxed) & direction.bit() == 0
            || self.group.pass_at_once(self.id, direction, length_bytes)
        {
            return None;
        }
        Some(Box::pin(Passing { member: self, direction, length_bytes, id: None, sleep: None }))
    }
}

impl Default for Group {
    fn default() -> Self {
        let buckets = || std::array::from_fn(|_| Bucket::new(Default::default()));
        let state = State {
            limits: None,
            operations: buckets(),
            bytes: buckets(),
            leaked_at: Duration::ZERO,
            drained: Vec::new(),
            flows: VecDeque::new(),
            last_id: 0,
        };
        Self { limited: AtomicU8::new(0), state: Mutex::new(state) }
    }
}

impl Group {
    /// Passes a request if nobody waits whom it would overtake, and there is room, or if its member is drained.
    fn pass_at_once(&self, member: u64, direction: Direction, length_bytes: u64) -> bool {
        let mut state = lock(&self.state);
        let drained = state.drained.contains(&member);
        if !state.flows.is_empty() && !drained {
            return false;
        }
        state.leak();
        let passes = drained || state.wait(direction).is_zero();
        if passes {
            state.pour(direction, length_bytes);
        }
        passes
    }

    fn set_limits(&self, limits: Limits) -> Result<()> {
        let mut state = lock(&self.state);
        match &state.limits {
            Some(known) if *known == limits => {}
            Some(_) => {
                return Err(Error::option(
                    "group",
                    "other limits are in force in this group, expected the same ones or none",
                ));
            }
            None => self.put(&mut state, limits),
        }
        Ok(())
    }

    fn put(&self, state: &mut State, limits: Limits) {
        state.operations = limits.operations.map(Bucket::new);
        state.bytes = limits.bytes.map(Bucket::new);
        state.leaked_at = now();
        let limited = |direction: Direction| if limits.concern(direction) { direction.bit() } else { 0 };
        self.limited.store(limited(Direction::Read) | limited(Direction::Write), Relaxed);
        state.limits = Some(limits);
    }
}

impl State {
    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn leak(&mut self) {
        let now = now();
        let elapsed = now.saturating_sub(self.leaked_at);
        self.operations.iter_mut().chain(&mut self.bytes).for_each(|bucket| bucket.leak(elapsed));
        self.leaked_at = self.leaked_at.max(now);
    }

    /// How long until a request of that direction may pass, if it is the next.
    fn wait(&self, direction: Direction) -> Duration {
        let concerned = [0, 1 + direction as usize];
        let waits = concerned.into_iter().map(|at| self.operations[at].wait().max(self.bytes[at].wait()));
        waits.max().unwrap_or_default()
    }

    fn pour(&mut self, direction: Direction, length_bytes: u64) {
        let operations = self.limits.as_ref().map_or(1.0, |limits| limits.operations_of(length_bytes));
        for at in [0, 1 + direction as usize] {
            self.operations[at].pour(operations);
            self.bytes[at].pour(length_bytes as f64);
        }
    }

    /// Lets pass what may pass now, in turn. Returns whom to wake: those that passed, and those that come next.
    fn turn(&mut self) -> Vec<Waker> {
        self.leak();
        let mut woken = Vec::new();
        while let Some(at) = self.flows.iter().position(|flow| self.wait(flow.direction).is_zero()) {
            let mut flow = self.flows.remove(at).expect("it was just found");
            let passed = flow.waiting.pop_front().expect("a flow has somebody waiting");
            self.pour(flow.direction, passed.length_bytes);
            woken.push(passed.waker);
            // The next one has to set its timer.
            woken.extend(flow.waiting.front().map(|next| next.waker.clone()));
            if !flow.waiting.is_empty() {
                self.flows.push_back(flow);
            }
        }
        woken
    }

    /// Lets all requests of a member pass. Returns whom to wake. Those of others wait on: for them it became no earlier.
    fn let_go(&mut self, member: u64) -> Vec<Waker> {
        self.leak();
        let (gone, stay) =
            std::mem::take(&mut self.flows).into_iter().partition(|flow: &Flow| flow.member == member);
        self.flows = stay;
        let gone: VecDeque<Flow> = gone;
        let mut woken = Vec::new();
        for flow in gone {
            for passed in flow.waiting {
                self.pour(flow.direction, passed.length_bytes);
                woken.push(passed.waker);
            }
        }
        woken
    }

    fn find(&mut self, member: u64, direction: Direction) -> Option<usize> {
        self.flows.iter().position(|flow| flow.member == member && flow.direction == direction)
    }
}

/// The future of [`Member::turn`].
#[derive(Debug)]
pub(crate) struct Passing<'a> {
    member: &'a Member,
    direction: Direction,
    length_bytes: u64,
    /// While it waits.
    id: Option<u64>,
    /// Of the first of a flow.
    sleep: Option<Sleep>,
}

impl Future for Passing<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let me = &mut *self;
        let mut state = lock(&me.member.group.state);
        let id = match me.id {
            Some(id) => id,
            // The drain began after it was told to wait.
            None if state.drained.contains(&me.member.id) => {
                state.leak();
                state.pour(me.direction, me.length_bytes);
                return Poll::Ready(());
            }
            None => {
                let id = state.new_id();
                let waiting = Waiting { id, length_bytes: me.length_bytes, waker: cx.waker().clone() };
                match state.find(me.member.id, me.direction) {
                    Some(at) => state.flows[at].waiting.push_back(waiting),
                    None => {
                        let (member, direction) = (me.member.id, me.direction);
                        state.flows.push_back(Flow { member, direction, waiting: [waiting].into() });
                    }
                }
                me.id = Some(id);
                id
            }
        };
        loop {
            let woken = state.turn();
            let (position, wait) = match state.find(me.member.id, me.direction) {
                Some(at) => {
                    let flow = &mut state.flows[at];
                    let position = flow.waiting.iter().position(|waiting| waiting.id == id);
                    if let Some(position) = position {
                        flow.waiting[position].waker.clone_from(cx.waker());
                    }
                    (position, state.wait(me.direction))
                }
                None => (None, Duration::ZERO),
            };
            let deadline = state.leaked_at + wait;
            drop(state);
            // Wakers run code of others, so never under the mutex.
            woken.into_iter().for_each(Waker::wake);
            match position {
                None => {
                    me.id = None;
                    return Poll::Ready(());
                }
                // Its time comes with its place.
                Some(1..) => return Poll::Pending,
                Some(0) => {}
            }
            me.sleep = Some(sleep_until(deadline));
            match Pin::new(me.sleep.as_mut().expect("just set")).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) => state = lock(&me.member.group.state),
            }
        }
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let mut state = lock(&self.member.group.state);
        let Some(at) = state.find(self.member.id, self.direction) else { return };
        let flow = &mut state.flows[at];
        // If it passed meanwhile, what it took stays taken: it is as if it had been done.
        let Some(position) = flow.waiting.iter().position(|waiting| waiting.id == id) else { return };
        flow.waiting.remove(position);
        let next = flow.waiting.front().filter(|_| position == 0).map(|next| next.waker.clone());
        if flow.waiting.is_empty() {
            state.flows.remove(at);
        }
        drop(state);
        next.into_iter().for_each(Waker::wake);
    }
}
