//! Locks that keep other programs out, in the way of QEMU's file driver, so that it and we see each other.
//!
//! For each of the four permissions two bytes of the file are locked, both shared, whether or not the file has them:
//!
//! ```text
//! byte 100 + n: I use permission n          n: 0 consistent read, 1 write,
//! byte 200 + n: nobody else may use it         2 write unchanged, 3 resize
//! ```
//!
//! Who wants a permission takes its locks first and looks afterwards whether anybody else has the contrary one, so of two
//! that come at the same time at least one notices. (QEMU block/file-posix.c: RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE.) The
//! locks belong to the open file, not to the process: two nodes of one program exclude each other as well.
//!
//! What users of a node share they share with each other, in their graph, which knows all of them. With other programs a
//! writer never shares writing, whatever its users say: nothing orders the writes of two programs, and each of them
//! believes what it has cached. (QEMU leaves that to the user of the node, so its exports of a raw image let each other
//! write.) Whoever wants it nevertheless turns `locking` off.

use super::{Locking, holder, io_error};
use driveline_engine::file::{File, LockKind};
use driveline_graph::{Error, Kind, Permissions, Result};
use parking_lot::Mutex;
use std::{io, ops::Range, path::Path};

const USED: u64 = 100;
const UNSHARED: u64 = 200;

/// What is locked. Both are sets of permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    used: Permissions,
    unshared: Permissions,
}

impl Held {
    /// The bytes to lock for it.
    pub(super) fn bytes(self) -> impl Iterator<Item = u64> {
        bytes(USED, self.used).chain(bytes(UNSHARED, self.unshared))
    }

    /// What is locked for users that together need and share this.
    fn of(needs: Permissions, shares: Permissions) -> Self {
        let writes = needs.intersects(Permissions::WRITE.or(Permissions::WRITE_UNCHANGED));
        let shares = if writes { shares.without(Permissions::WRITE) } else { shares };
        Self { used: needs, unshared: Permissions::ALL.without(shares) }
    }

    fn without(self, other: Self) -> Self {
        Self { used: self.used.without(other.used), unshared: self.unshared.without(other.unshared) }
    }
}

fn bytes(base: u64, permissions: Permissions) -> impl Iterator<Item = u64> {
    (0..4).filter(move |bit| permissions.0 & 1 << bit != 0).map(move |bit| base + bit)
}

fn one(byte: u64) -> Range<u64> {
    byte..byte + 1
}

/// The locks of an open file.
#[derive(Debug)]
pub(super) struct Locks {
    /// `None`: locking is off, or the file system has no locks.
    state: Option<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    held: Held,
    /// What was held before "write" was taken, not because a user needed it but because the file was made writable. That
    /// lasts until the graph says who uses the file: before a format looks at it, let alone changes it, another writer
    /// must have been noticed.
    for_now: Option<Held>,
}

impl Locks {
    /// Finds out whether the file can be locked.
    pub(super) fn new(file: &File, locking: Locking, path: &Path) -> Result<Self> {
        if locking == Locking::Off {
            return Ok(Self { state: None });
        }
        // The question alone has no effect.
        match (file.can_lock_ofd(one(USED), LockKind::Shared), locking) {
            (Ok(_), _) => Ok(Self { state: Some(Mutex::default()) }),
            (Err(error), Locking::On) => Err(io_error(&error, "locking", path).key("locking")),
            (Err(error), _) => {
                tracing::warn!(
                    "'{}' is used without locks, which are not to be had: {error}",
                    path.display()
                );
                Ok(Self { state: None })
            }
        }
    }

    /// What is held now.
    pub(super) fn held(&self) -> Held {
        self.state.as_ref().map(|state| state.lock().held).unwrap_or_default()
    }

    /// Holds what `needs` and `shares` say, instead of what was held. On an error that stays.
    pub(super) fn take(
        &self,
        file: &File,
        needs: Permissions,
        shares: Permissions,
        path: &Path,
    ) -> Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        let mut state = state.lock();
        replace(file, &mut state.held, Held::of(needs, shares), path)?;
        state.for_now = None;
        Ok(())
    }

    /// The file is about to become writable: holds "write" for now.
    pub(super) fn take_write(&self, file: &File, path: &Path) -> Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        let mut state = state.lock();
        let before = state.held;
        let shares = Permissions::ALL.without(before.unshared);
        replace(file, &mut state.held, Held::of(before.used.or(Permissions::WRITE), shares), path)?;
        state.for_now.get_or_insert(before);
        Ok(())
    }

    /// The file is no longer writable: gives up what was held for now.
    pub(super) fn give_write_up(&self, file: &File) {
        let Some(state) = &self.state else { return };
        let mut state = state.lock();
        if let Some(before) = state.for_now.take() {
            unlock_all(file, state.held.without(before));
            state.held = before;
        }
    }

    /// Gives up all locks.
    pub(super) fn release(&self, file: &File) {
        if let Some(state) = &self.state {
            unlock_all(file, std::mem::take(&mut *state.lock()).held);
        }
    }

    /// For people.
    pub(super) fn details(&self) -> serde_json::Value {
        match &self.state {
            None => serde_json::Value::Null,
            Some(state) => {
                let held = state.lock().held;
                serde_json::json!({
                    "used": held.used.to_string(),
                    "not-shared": held.unshared.to_string(),
                })
            }
        }
    }
}

fn replace(file: &File, held: &mut Held, wanted: Held, path: &Path) -> Result<()> {
    let added = wanted.without(*held);
    let taken = lock_all(file, added, path).and_then(|()| check(file, wanted, path));
    let surplus = if taken.is_ok() { held.without(wanted) } else { added };
    unlock_all(file, surplus);
    if taken.is_ok() {
        *held = wanted;
    }
    taken
}

fn lock_all(file: &File, wanted: Held, path: &Path) -> Result<()> {
    for byte in wanted.bytes() {
        match file.try_lock_ofd(one(byte), LockKind::Shared) {
            Ok(true) => {}
            Ok(false) => {
                let who = holder::of(file, byte);
                let text =
                    format_args!("'{}' is in use: {who} has locked it for itself alone", path.display());
                return Err(Error::new(Kind::Busy, text));
            }
            Err(error) => return Err(io_error(&error, "locking", path)),
        }
    }
    Ok(())
}

/// Does anybody else hold the contrary of what we have locked?
fn check(file: &File, wanted: Held, path: &Path) -> Result<()> {
    for byte in bytes(UNSHARED, wanted.used).chain(bytes(USED, wanted.unshared)) {
        // An exclusive lock is refused exactly if somebody else holds a shared one.
        match file.can_lock_ofd(one(byte), LockKind::Exclusive) {
            Ok(true) => {}
            Ok(false) => return Err(conflict(file, byte, path)),
            Err(error) => return Err(io_error(&error, "looking for locks of", path)),
        }
    }
    Ok(())
}

fn conflict(file: &File, byte: u64, path: &Path) -> Error {
    let (path, who) = (path.display(), holder::of(file, byte));
    let text = if byte >= UNSHARED {
        let permission = Permissions(1 << (byte - UNSHARED));
        format!("'{path}' is in use: failed to get \"{permission}\" lock, because {who} does not share it")
    } else {
        let permission = Permissions(1 << (byte - USED));
        format!(
            "'{path}' is in use: failed to get shared \"{permission}\" lock, because {who} holds \"{permission}\""
        )
    };
    Error::new(Kind::Busy, text)
}

/// Unlocking fails only on odd network file systems; then there is nothing better to do than to say so.
pub(super) fn unlock_all(file: &File, held: Held) {
    for byte in held.bytes() {
        if let Err(error) = file.unlock_ofd(one(byte)) {
            tracing::warn!("byte {byte} of a file stays locked: {error}");
        }
    }
}

/// Takes the same locks on another opening of the file that this one is.
pub(super) fn copy(held: Held, to: &File) -> io::Result<bool> {
    for byte in held.bytes() {
        if !to.try_lock_ofd(one(byte), LockKind::Shared)? {
            return Ok(false);
        }
    }
    Ok(true)
}
