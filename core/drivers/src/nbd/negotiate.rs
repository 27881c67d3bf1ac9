//! The client's side of the handshake.

use super::terms::Terms;
use driveline_transport::{Receive, Transport};
use driveline_wire::{
    BlockSizes, ClientFlags, ContextId, ExportNameReply, Greeting, HandshakeFlags, Headers, Info,
    InfoRequest, InfoType, MetaContextRequest, OptionCode, OptionReply, OptionReplyHeader, OptionRequest,
    PAYLOAD_LENGTH_MAX, ReplyCode, TransmissionFlags,
};
use std::io::{self, IoSlice};

/// The longest data of an option reply that is looked at.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// So many replies to one option are more than any question of ours has.
const REPLIES_MAX: usize = 64;

/// What is wanted of a server.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) export: String,
    /// The metadata context for block status.
    pub(super) context: String,
    /// Without that context there is no use in going on.
    pub(super) context_required: bool,
}

/// Reads what a server sends first, and answers. Returns whether options are answered one by one.
pub(super) async fn greet(transport: &impl Transport, receive: &mut Receive) -> io::Result<bool> {
    let greeting = take(transport, receive, Greeting::LENGTH).await?;
    let greeting = Greeting::decode(greeting).map_err(|error| refused(format!("no NBD server: {error}")))?;
    let fixed = greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
    let no_zeroes = greeting.flags.contains(HandshakeFlags::NO_ZEROES);
    let mut out = Vec::new();
    ClientFlags::EMPTY
        .with(ClientFlags::FIXED_NEWSTYLE, fixed)
        .with(ClientFlags::NO_ZEROES, no_zeroes)
        .encode(&mut out);
    transport.write_all(&[IoSlice::new(&out)]).await?;
    if fixed && no_zeroes {
        return Ok(true);
    }
    // Whoever is older than that knows no options beyond the name, or leaves it open how long an answer is.
    match fixed {
        true => Err(refused("the server does not know how to leave out zeroes".into())),
        false => Err(refused("the server does not speak fixed newstyle".into())),
    }
}

/// Asks for TLS. The connection is to be upgraded then, and haggling begins anew.
pub(super) async fn start_tls(transport: &impl Transport, receive: &mut Receive) -> io::Result<()> {
    let mut haggling = Haggling { transport, receive, data: Vec::new() };
    match haggling.ask(&OptionRequest::StartTls, |_| Ok(())).await? {
        Ok(()) if haggling.receive.is_empty() => Ok(()),
        // It would be taken for something that came encrypted.
        Ok(()) => Err(refused("the server sent data before the TLS handshake".into())),
        Err(refusal) => Err(refused(format!("Server does not support STARTTLS: {}", refusal.text()))),
    }
}

/// Haggles until the export is ours.
pub(super) async fn haggle(
    transport: &impl Transport,
    receive: &mut Receive,
    wanted: &Wanted,
) -> io::Result<Terms> {
    let mut haggling = Haggling { transport, receive, data: Vec::new() };
    let extended = haggling.agrees(&OptionRequest::ExtendedHeaders).await?;
    let structured = extended || haggling.agrees(&OptionRequest::StructuredReply).await?;
    let context = if structured { haggling.select(wanted).await? } else { None };
    if wanted.context_required && context.is_none() {
        return Err(refused(format!("requested x-dirty-bitmap {} not found", wanted.context)));
    }
    let found = haggling.go(wanted).await?;
    let block_bytes_min = found.sizes.map(|sizes| sizes.minimum_bytes);
    let terms = Terms {
        size_bytes: found.size_bytes,
        flags: found.flags,
        headers: if extended { Headers::Extended } else { Headers::Compact },
        structured,
        block_bytes_min,
        payload_bytes_max: found.sizes.map_or(PAYLOAD_LENGTH_MAX, |sizes| sizes.payload_bytes_max),
        context,
    };
    check(&terms)?;
    Ok(terms)
}

/// Nothing that a server says about its export is taken on trust: it becomes the limits of a node.
fn check(terms: &Terms) -> io::Result<()> {
    let alignment = terms.alignment();
    if !alignment.is_power_of_two() || alignment > 1 << 16 {
        let text = format!(
            "server advertised minimum block size {alignment} which is not a power of two up to 64 KiB"
        );
        return Err(refused(text));
    }
    if terms.transfer_bytes_max() < u64::from(alignment) {
        return Err(refused(format!(
            "server advertised maximum block size {}, less than its minimum {alignment}",
            terms.payload_bytes_max
        )));
    }
    if terms.size_bytes > i64::MAX as u64 {
        return Err(refused(format!("export length {} is larger than 8 EiB", terms.size_bytes)));
    }
    if !terms.size_bytes.is_multiple_of(u64::from(alignment)) {
        return Err(refused(format!(
            "export length {} is not multiple of minimum block size {alignment}",
            terms.size_bytes
        )));
    }
    Ok(())
}

/// The export, as a server described it.
struct Found {
    size_bytes: u64,
    flags: TransmissionFlags,
    sizes: Option<BlockSizes>,
}

/// A server's no.
struct Refusal {
    code: ReplyCode,
    message: String,
    option: OptionCode,
}

impl Refusal {
    fn text(&self) -> String {
        let what = match self.code {
            ReplyCode::ERR_TLS_REQD => {
                return format!(
                    "Server requires TLS for option {} ({}). Did you forget a valid tls-creds?",
                    self.option.0, self.option
                );
            }
            ReplyCode::ERR_UNKNOWN => "Requested export not available".to_owned(),
            ReplyCode::ERR_POLICY => format!("Denied by server for option {}", self.option),
            ReplyCode::ERR_SHUTDOWN => "Server shutting down".to_owned(),
            code => format!("option {} failed with {code}", self.option),
        };
        if self.message.is_empty() { what } else { format!("{what} (server reported: {})", self.message) }
    }
}

struct Haggling<'a, T> {
    transport: &'a T,
    receive: &'a mut Receive,
    data: Vec<u8>,
}

impl<T: Transport> Haggling<'_, T> {
    /// Asks, and looks at each reply before the last.
    async fn ask(
        &mut self,
        request: &OptionRequest<'_>,
        mut look: impl FnMut(&OptionReply<'_>) -> io::Result<()>,
    ) -> io::Result<Result<(), Refusal>> {
        let option = request.code();
        let mut out = Vec::new();
        request.encode(&mut out);
        self.transport.write_all(&[IoSlice::new(&out)]).await?;
        for _ in 0..REPLIES_MAX {
            let header = take(self.transport, self.receive, OptionReplyHeader::LENGTH).await?;
            let header = OptionReplyHeader::decode(header).map_err(malformed)?;
            if header.option != option {
                return Err(refused(format!("the server answers {} instead of {option}", header.option)));
            }
            if header.length > REPLY_BYTES_MAX {
                return Err(refused(format!("an answer of {} bytes to option {option}", header.length)));
            }
            self.data.resize(header.length as usize, 0);
            self.receive.fill(self.transport, &mut self.data).await?;
            match OptionReply::decode(header.code, &self.data) {
                Ok(OptionReply::Ack) => return Ok(Ok(())),
                Ok(OptionReply::Error { code, message }) => {
                    return Ok(Err(Refusal { code, message: message.to_owned(), option }));
                }
                // The text of a refusal is for people: one that cannot be read is a refusal still.
                Err(_) if header.code.is_error() => {
                    return Ok(Err(Refusal { code: header.code, message: String::new(), option }));
                }
                Ok(reply) => look(&reply)?,
                Err(error) => return Err(malformed(error)),
            }
        }
        Err(refused(format!("more than {REPLIES_MAX} answers to option {option}")))
    }

    /// Asks for what a server may know or not.
    async fn agrees(&mut self, request: &OptionRequest<'_>) -> io::Result<bool> {
        match self.ask(request, |_| Ok(())).await? {
            Ok(()) => Ok(true),
            Err(Refusal {
                code: ReplyCode::ERR_UNSUP | ReplyCode::ERR_INVALID | ReplyCode::ERR_POLICY,
                ..
            }) => Ok(false),
            Err(refusal) => Err(refused(refusal.text())),
        }
    }

    /// Selects the context that is wanted.
    async fn select(&mut self, wanted: &Wanted) -> io::Result<Option<ContextId>> {
        let request = MetaContextRequest { export: &wanted.export, queries: vec![&wanted.context] };
        let mut selected = None;
        let look = |reply: &OptionReply<'_>| match reply {
            OptionReply::MetaContext { id, name } if *name == wanted.context && selected.is_none() => {
                selected = Some(*id);
                Ok(())
            }
            other => Err(refused(format!("unexpected answer to a context: {other:?}"))),
        };
        match self.ask(&OptionRequest::SetMetaContext(request), look).await? {
            Ok(()) => Ok(selected),
            Err(Refusal { code: ReplyCode::ERR_TLS_REQD, option, message }) => {
                Err(refused(Refusal { code: ReplyCode::ERR_TLS_REQD, option, message }.text()))
            }
            // Whether the export is there is told by the next question.
            Err(_) => Ok(None),
        }
    }

    /// Chooses the export.
    async fn go(&mut self, wanted: &Wanted) -> io::Result<Found> {
        let (mut export, mut sizes) = (None, None);
        let look = |reply: &OptionReply<'_>| {
            match reply {
                OptionReply::Info(Info::Export { size_bytes, flags }) => export = Some((*size_bytes, *flags)),
                OptionReply::Info(Info::BlockSize(found)) => sizes = Some(*found),
                OptionReply::Info(_) => {}
                other => return Err(refused(format!("unexpected answer to GO: {other:?}"))),
            }
            Ok(())
        };
        let request = InfoRequest { export: &wanted.export, infos: vec![InfoType::BLOCK_SIZE] };
        match self.ask(&OptionRequest::Go(request), look).await? {
            Ok(()) => match export {
                Some((size_bytes, flags)) => Ok(Found { size_bytes, flags, sizes }),
                None => Err(refused("the server began without a word about the export".into())),
            },
            Err(Refusal { code: ReplyCode::ERR_UNSUP, .. }) => self.export_name(wanted).await,
            Err(refusal) => Err(refused(refusal.text())),
        }
    }

    /// The older way, which has no answer that says no.
    async fn export_name(&mut self, wanted: &Wanted) -> io::Result<Found> {
        let mut out = Vec::new();
        OptionRequest::ExportName(&wanted.export).encode(&mut out);
        self.transport.write_all(&[IoSlice::new(&out)]).await?;
        let reply = take(self.transport, self.receive, ExportNameReply::length(true)).await?;
        let ExportNameReply { size_bytes, flags } =
            ExportNameReply::decode(reply, true).map_err(malformed)?;
        Ok(Found { size_bytes, flags, sizes: None })
    }
}

async fn take<'a>(
    transport: &impl Transport,
    receive: &'a mut Receive,
    length: usize,
) -> io::Result<&'a [u8]> {
    receive.take(transport, length).await?.ok_or_else(|| {
        io::Error::new(io::ErrorKind::UnexpectedEof, "the server ended the connection in the handshake")
    })
}

fn malformed(error: driveline_wire::Malformed) -> io::Error {
    refused(format!("malformed answer: {error}"))
}

/// What no second try with the same server would mend.
fn refused(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}
