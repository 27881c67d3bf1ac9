//! Finding the header among its two copies, or what is left of it.

use crate::header::{Base, COPIES, COPY_BYTES, Decoded, Header, Role, VERSION, decode};
use crate::volume::Volume;
use crate::{BootId, Error, LogOptions, Result, Uuid};

/// The header of a file.
#[derive(Debug)]
pub(crate) struct FoundHeader {
    pub(crate) header: Header,
    pub(crate) sequence: u64,
    /// Which copy it was.
    pub(crate) copy: usize,
    /// What is wrong with both copies: the header is what could be told from them.
    pub(crate) damage: Option<String>,
    pub(crate) owner_lost: bool,
}

/// Reads both copies and takes the newer one, or what can be told from damaged ones.
pub(crate) fn find_header(volume: &Volume) -> Result<FoundHeader> {
    let path = || volume.path.clone();
    let mut copies = [vec![0; COPY_BYTES as usize], vec![0; COPY_BYTES as usize]];
    for (copy, at) in copies.iter_mut().zip(COPIES) {
        volume.read_at(copy, at)?;
    }
    let start = copies[0][..8].to_vec();
    let mut best: Option<FoundHeader> = None;
    let mut damaged = Vec::new();
    for (copy, bytes) in copies.iter().enumerate() {
        match decode(bytes) {
            Decoded::Version(found) => {
                return Err(Error::Version { path: path(), found, expected: VERSION });
            }
            Decoded::Sound { sequence, header } => {
                if best.as_ref().is_none_or(|best| best.sequence < sequence) {
                    let (damage, owner_lost) = (None, false);
                    best = Some(FoundHeader { header, sequence, copy, damage, owner_lost });
                }
            }
            Decoded::Damaged { reason, base, owner, rows } => damaged.push((reason, base, owner, rows)),
            Decoded::Foreign => {}
        }
    }
    if let Some(mut best) = best {
        let next_id = best.header.rows.iter().map(|row| row.id + 1).max().unwrap_or(1);
        best.header.base.next_id = best.header.base.next_id.max(next_id);
        return Ok(best);
    }
    if damaged.is_empty() {
        let found = match start.iter().all(|&byte| byte == 0) {
            true => "nothing but zeros".to_owned(),
            false => format!("\"{}\"", start.escape_ascii()),
        };
        return Err(Error::Foreign { path: path(), found });
    }
    let (mut base, mut owner, mut rows) = (None, None, Vec::new());
    let mut reasons = Vec::new();
    for (reason, its_base, its_owner, its_rows) in damaged {
        base = base.or(its_base);
        owner = owner.or(its_owner);
        for row in its_rows {
            if rows.iter().all(|known: &crate::header::Row| known.id != row.id) {
                rows.push(row);
            }
        }
        reasons.push(reason);
    }
    let reason = reasons.join(", and of the other copy ");
    if rows.is_empty() {
        return Err(Error::NamesLost { path: path(), reason });
    }
    // Rows of two ages may tell of one place twice; nothing of what is there is used any more.
    rows.iter_mut().for_each(|row| row.places = Default::default());
    let next_id = rows.iter().map(|row| row.id + 1).max().unwrap_or(1);
    let base = base.unwrap_or_else(|| Base {
        uuid: Uuid::random(),
        generation: 1,
        drive_size: rows.iter().map(|row| row.record.length).max().unwrap_or(0),
        boot_id: BootId([0; 16]),
        clean: false,
        role: Role::Counts,
        epoch: 0,
        log: LogOptions::default(),
        rings: 0..0,
        next_id,
    });
    let base = Base { clean: false, rings: 0..0, next_id: base.next_id.max(next_id), ..base };
    let header = Header { base, owner: owner.clone().unwrap_or_default(), rows };
    let damage = Some(format!("both headers are damaged: {reason}"));
    Ok(FoundHeader { header, sequence: 1 << 62, copy: 1, damage, owner_lost: owner.is_none() })
}
