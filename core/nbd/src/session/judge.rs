//! Whether a request may be done at all. Pure: it sees the terms of the session and the request, nothing else.

use driveline_wire::{Command, CommandFlags, Errno, Headers, PAYLOAD_LENGTH_MAX, Request};

/// What was agreed for a session, as far as requests are measured by it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) headers: Headers,
    /// Structured replies were agreed, or extended headers, which imply them.
    pub(crate) structured: bool,
    pub(crate) writable: bool,
    /// Size of the export when the session began.
    pub(crate) size_bytes: u64,
    /// What the client promised to align to.
    pub(crate) alignment: u32,
    /// How many metadata contexts were selected.
    pub(crate) contexts: usize,
}

/// A refused request: why, for the program and for the human.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) errno: Errno,
    pub(crate) message: &'static str,
}

/// A refusal because of the request itself.
pub(crate) const fn invalid(message: &'static str) -> Refusal {
    Refusal { errno: Errno::EINVAL, message }
}

/// Judges `request`, but not its payload.
///
/// Source: proto.md, "Command flags", "Request types" and "Error values".
pub(crate) fn judge(terms: &Terms, request: &Request) -> Result<(), Refusal> {
    let Request { command, flags, .. } = *request;
    if !flags.beyond(flags_allowed(terms, command).ok_or(invalid("unknown command"))?).is_empty() {
        return Err(invalid("a command flag is not valid for this command"));
    }
    let writes = matches!(command, Command::WRITE | Command::TRIM | Command::WRITE_ZEROES);
    if writes && !terms.writable {
        return Err(Refusal { errno: Errno::EPERM, message: "the export is read-only" });
    }
    if command == Command::BLOCK_STATUS {
        if terms.contexts == 0 {
            return Err(invalid("no metadata context was selected"));
        }
        if flags.contains(CommandFlags::PAYLOAD_LEN) {
            // The length is that of the payload; the range is judged when the payload is known.
            return Ok(());
        }
    }
    if command == Command::FLUSH {
        // Range fields are reserved here, and some clients leave things in them.
        return Ok(());
    }
    judge_range(terms, request, request.length)
}

/// Judges the range of `length` bytes at the request's offset.
pub(crate) fn judge_range(terms: &Terms, request: &Request, length: u64) -> Result<(), Refusal> {
    let inside = request.offset.checked_add(length).is_some_and(|end| end <= terms.size_bytes);
    if !inside {
        let errno = match request.command {
            Command::WRITE | Command::WRITE_ZEROES => Errno::ENOSPC,
            _ => Errno::EINVAL,
        };
        return Err(Refusal { errno, message: "the range ends beyond the export" });
    }
    let alignment = u64::from(terms.alignment);
    if !request.offset.is_multiple_of(alignment) || !length.is_multiple_of(alignment) {
        return Err(invalid("the range is not aligned to the minimum block size"));
    }
    let payload = matches!(request.command, Command::READ | Command::WRITE);
    if payload && length > PAYLOAD_LENGTH_MAX.into() {
        return Err(Refusal { errno: Errno::EOVERFLOW, message: "the payload is longer than 32 MiB" });
    }
    if request.command == Command::BLOCK_STATUS && length == 0 {
        return Err(invalid("block status of nothing"));
    }
    Ok(())
}

/// The flags that a command may have; `None` for an unknown command.
///
/// FUA is allowed everywhere, as proto.md demands of servers that offer it at all.
fn flags_allowed(terms: &Terms, command: Command) -> Option<CommandFlags> {
    let extended = terms.headers == Headers::Extended;
    let own = match command {
        Command::READ => CommandFlags::EMPTY.with(CommandFlags::DF, terms.structured),
        Command::WRITE => CommandFlags::EMPTY.with(CommandFlags::PAYLOAD_LEN, extended),
        Command::WRITE_ZEROES => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
        Command::BLOCK_STATUS => CommandFlags::REQ_ONE.with(CommandFlags::PAYLOAD_LEN, extended),
        Command::FLUSH | Command::TRIM | Command::CACHE => CommandFlags::EMPTY,
        _ => return None,
    };
    Some(CommandFlags::FUA | own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_wire::Cookie;

    const TERMS: Terms = Terms {
        headers: Headers::Compact,
        structured: true,
        writable: true,
        size_bytes: 1 << 30,
        alignment: 512,
        contexts: 1,
    };

    fn verdict(terms: Terms, command: Command, flags: CommandFlags, offset: u64, length: u64) -> Errno {
        let request = Request { flags, command, cookie: Cookie(1), offset, length };
        judge(&terms, &request).err().map_or(Errno::OK, |refusal| refusal.errno)
    }

    const NONE: CommandFlags = CommandFlags::EMPTY;

    #[test]
    fn ranges_beyond_the_end_are_out_of_space_for_writes_and_invalid_otherwise() {
        for (command, errno) in [
            (Command::READ, Errno::EINVAL),
            (Command::TRIM, Errno::EINVAL),
            (Command::CACHE, Errno::EINVAL),
            (Command::BLOCK_STATUS, Errno::EINVAL),
            (Command::WRITE, Errno::ENOSPC),
            (Command::WRITE_ZEROES, Errno::ENOSPC),
        ] {
            assert_eq!(verdict(TERMS, command, NONE, (1 << 30) - 512, 512), Errno::OK);
            assert_eq!(verdict(TERMS, command, NONE, (1 << 30) - 512, 1024), errno);
            assert_eq!(verdict(TERMS, command, NONE, u64::MAX - 511, 512), errno);
            assert_eq!(verdict(TERMS, command, NONE, 1, 512), Errno::EINVAL);
            assert_eq!(verdict(TERMS, command, NONE, 0, 513), Errno::EINVAL);
        }
    }

    #[test]
    fn only_payload_is_limited() {
        let too_much = u64::from(PAYLOAD_LENGTH_MAX) + 512;
        assert_eq!(verdict(TERMS, Command::READ, NONE, 0, too_much), Errno::EOVERFLOW);
        assert_eq!(verdict(TERMS, Command::WRITE, NONE, 0, too_much), Errno::EOVERFLOW);
        assert_eq!(verdict(TERMS, Command::TRIM, NONE, 0, 1 << 30), Errno::OK);
        assert_eq!(verdict(TERMS, Command::WRITE_ZEROES, NONE, 0, 1 << 30), Errno::OK);
    }

    #[test]
    fn each_command_has_its_flags_and_no_others() {
        let allowed = |terms: Terms, command| {
            (0..16)
                .map(|bit| CommandFlags(1 << bit))
                .filter(|flag| verdict(terms, command, *flag, 0, 512) == Errno::OK)
                .fold(NONE, |all, flag| all | flag)
        };
        let fua = CommandFlags::FUA;
        assert_eq!(allowed(TERMS, Command::READ), fua | CommandFlags::DF);
        assert_eq!(allowed(Terms { structured: false, ..TERMS }, Command::READ), fua);
        assert_eq!(allowed(TERMS, Command::WRITE), fua);
        assert_eq!(allowed(TERMS, Command::FLUSH), fua);
        assert_eq!(allowed(TERMS, Command::TRIM), fua);
        assert_eq!(allowed(TERMS, Command::CACHE), fua);
        assert_eq!(
            allowed(TERMS, Command::WRITE_ZEROES),
            fua | CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO
        );
        assert_eq!(allowed(TERMS, Command::BLOCK_STATUS), fua | CommandFlags::REQ_ONE);
        assert_eq!(allowed(TERMS, Command::RESIZE), NONE);
        assert_eq!(verdict(TERMS, Command::RESIZE, NONE, 0, 512), Errno::EINVAL);
        let extended = Terms { headers: Headers::Extended, ..TERMS };
        assert_eq!(allowed(extended, Command::WRITE), fua | CommandFlags::PAYLOAD_LEN);
        assert_eq!(allowed(extended, Command::TRIM), fua);
        assert_eq!(
            allowed(extended, Command::BLOCK_STATUS),
            fua | CommandFlags::REQ_ONE | CommandFlags::PAYLOAD_LEN
        );
    }

    #[test]
    fn a_read_only_export_is_not_written() {
        let terms = Terms { writable: false, ..TERMS };
        for command in [Command::WRITE, Command::TRIM, Command::WRITE_ZEROES] {
            assert_eq!(verdict(terms, command, NONE, 0, 512), Errno::EPERM);
        }
        assert_eq!(verdict(terms, Command::FLUSH, NONE, 0, 0), Errno::OK);
        assert_eq!(verdict(terms, Command::READ, NONE, 0, 512), Errno::OK);
    }

    #[test]
    fn block_status_needs_a_context_and_a_range() {
        assert_eq!(
            verdict(Terms { contexts: 0, ..TERMS }, Command::BLOCK_STATUS, NONE, 0, 512),
            Errno::EINVAL
        );
        assert_eq!(verdict(TERMS, Command::BLOCK_STATUS, NONE, 0, 0), Errno::EINVAL);
        assert_eq!(verdict(TERMS, Command::READ, NONE, 0, 0), Errno::OK);
    }
}
