//! The first phase of a connection: the client haggles over options until it has chosen an export.

use std::io::IoSlice;
use std::sync::Arc;

use crate::contexts::{Purpose, Selected, matching};
use crate::export::{Attached, Entry, Exports, Storage};
use crate::fault::Fault;
use crate::limits::{OPTION_BYTES_MAX, SKIP_BYTES_MAX};
use crate::session::Terms;
use driveline_transport::Receive;
use driveline_transport::Transport;
use driveline_wire::{
    ClientFlags, ContextId, ExportNameReply, Greeting, HandshakeFlags, Headers, Info, InfoRequest, InfoType,
    Malformed, MetaContextRequest, OptionCode, OptionHeader, OptionReply, OptionRequest, ReplyCode,
    TransmissionFlags,
};

/// What both sides agreed on.
#[derive(Debug)]
pub(crate) struct Negotiated<S> {
    pub(crate) attached: Attached<S>,
    pub(crate) terms: Terms,
    pub(crate) contexts: Vec<Selected>,
}

/// Where TLS stands on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Security {
    /// There is none, and will be none.
    None,
    /// It has to come before anything else.
    Required,
    /// It is on.
    On,
}

/// How haggling ends, if not with a fault.
#[derive(Debug)]
pub(crate) enum Haggled<S> {
    /// The client left in good order.
    Left,
    /// The connection is to be upgraded; then haggling begins anew.
    StartTls(ClientFlags),
    /// The client has chosen.
    Chosen(Box<Negotiated<S>>),
}

/// Shows the server, and haggles.
pub(crate) async fn handshake<T: Transport, S: Storage>(
    transport: &T,
    receive: &mut Receive,
    exports: &Exports<S>,
    security: Security,
) -> Result<Haggled<S>, Fault> {
    let mut out = Vec::new();
    Greeting { flags: HandshakeFlags::KNOWN }.encode(&mut out);
    transport.write_all(&[IoSlice::new(&out)]).await?;
    let Some(bytes) = receive.take(transport, ClientFlags::LENGTH).await? else { return Ok(Haggled::Left) };
    let flags = ClientFlags::decode(bytes)?;
    if !flags.beyond(ClientFlags::KNOWN).is_empty() {
        return Err(Fault::ClientFlags { flags: flags.0 });
    }
    haggle(transport, receive, exports, security, flags).await
}

/// Haggles until the client has chosen, or wants to do so in private. Nothing is agreed yet but `flags`.
pub(crate) async fn haggle<T: Transport, S: Storage>(
    transport: &T,
    receive: &mut Receive,
    exports: &Exports<S>,
    security: Security,
    flags: ClientFlags,
) -> Result<Haggled<S>, Fault> {
    let mode = Mode::default();
    let mut haggling = Haggling { exports, security, flags, mode, selection: None, out: Vec::new() };
    let mut data = Vec::new();
    loop {
        let Some(bytes) = receive.take(transport, OptionHeader::LENGTH).await? else {
            return Ok(Haggled::Left);
        };
        let header = OptionHeader::decode(bytes)?;
        haggling.out.clear();
        let next = if header.length as usize <= OPTION_BYTES_MAX {
            data.resize(header.length as usize, 0);
            receive.fill(transport, &mut data).await?;
            haggling.option(header.option, &data)?
        } else if u64::from(header.length) <= SKIP_BYTES_MAX && header.option != OptionCode::EXPORT_NAME {
            receive.skip(transport, header.length.into()).await?;
            haggling.refuse(header.option, ReplyCode::ERR_TOO_BIG, "the option's data is too long")
        } else {
            return Err(Fault::TooLong { what: header.option.to_string(), length: header.length.into() });
        };
        transport.write_all(&[IoSlice::new(&haggling.out)]).await?;
        match next {
            Next::Option => {}
            Next::Leave => return Ok(Haggled::Left),
            // What came before its answer came in the clear: nobody knows from whom.
            Next::StartTls if !receive.is_empty() => return Err(Fault::BeforeTls),
            Next::StartTls => return Ok(Haggled::StartTls(flags)),
            Next::Transmission(negotiated) => return Ok(Haggled::Chosen(negotiated)),
        }
    }
}

/// What comes after an option.
enum Next<S> {
    Option,
    Leave,
    StartTls,
    Transmission(Box<Negotiated<S>>),
}

/// How replies will look, as far as it was agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    #[default]
    Simple,
    Structured,
    Extended,
}

struct Haggling<'a, S> {
    exports: &'a Exports<S>,
    security: Security,
    flags: ClientFlags,
    mode: Mode,
    /// The contexts that were selected last, and for which export.
    selection: Option<(Arc<Entry<S>>, Vec<Selected>)>,
    out: Vec<u8>,
}

impl<S: Storage> Haggling<'_, S> {
    /// Answers one option into `out`.
    fn option(&mut self, option: OptionCode, data: &[u8]) -> Result<Next<S>, Fault> {
        if !self.flags.contains(ClientFlags::FIXED_NEWSTYLE) && option != OptionCode::EXPORT_NAME {
            return Err(Fault::Option { option, why: "the client did not agree to fixed newstyle" });
        }
        let open = [OptionCode::STARTTLS, OptionCode::ABORT].contains(&option);
        if self.security == Security::Required && !open {
            // This option has no reply that could say no.
            if option == OptionCode::EXPORT_NAME {
                return Err(Fault::Option { option, why: "not permitted before TLS" });
            }
            let message = format!("Option {:#x} not permitted before TLS", option.0);
            return Ok(self.refuse(option, ReplyCode::ERR_TLS_REQD, &message));
        }
        let request = match OptionRequest::decode(option, data) {
            Ok(request) => request,
            // This option has no reply that could say no.
            Err(error) if option == OptionCode::EXPORT_NAME => return Err(error.into()),
            Err(error) => {
                let code = match error {
                    Malformed::StringTooLong { .. } => ReplyCode::ERR_TOO_BIG,
                    _ => ReplyCode::ERR_INVALID,
                };
                return Ok(self.refuse(option, code, &error.to_string()));
            }
        };
        tracing::debug!(target: "driveline::nbd", ?request, "option");
        Ok(match request {
            OptionRequest::ExportName(name) => return self.export_name(name),
            OptionRequest::Abort => {
                self.reply(option, &OptionReply::Ack);
                Next::Leave
            }
            OptionRequest::List => {
                for entry in self.exports.all() {
                    let description = &*entry.export.description;
                    self.reply(option, &OptionReply::Server { name: &entry.name, description });
                }
                self.acknowledge(option)
            }
            OptionRequest::StructuredReply => match self.mode {
                Mode::Simple => self.agree(option, Mode::Structured),
                Mode::Structured => {
                    self.refuse(option, ReplyCode::ERR_INVALID, "structured replies are agreed already")
                }
                Mode::Extended => {
                    self.refuse(option, ReplyCode::ERR_EXT_HEADER_REQD, "extended headers are agreed already")
                }
            },
            OptionRequest::ExtendedHeaders => match self.mode {
                Mode::Simple | Mode::Structured => self.agree(option, Mode::Extended),
                Mode::Extended => {
                    self.refuse(option, ReplyCode::ERR_INVALID, "extended headers are agreed already")
                }
            },
            OptionRequest::Info(request) | OptionRequest::Go(request) => self.info(option, &request),
            OptionRequest::ListMetaContext(request) => self.contexts(option, &request, Purpose::List),
            OptionRequest::SetMetaContext(request) => self.contexts(option, &request, Purpose::Select),
            OptionRequest::StartTls => match self.security {
                Security::Required => {
                    self.reply(option, &OptionReply::Ack);
                    Next::StartTls
                }
                Security::On => self.refuse(option, ReplyCode::ERR_INVALID, "TLS already enabled"),
                Security::None => self.refuse(option, ReplyCode::ERR_POLICY, "TLS not configured"),
            },
            OptionRequest::Unknown(_) => self.refuse(option, ReplyCode::ERR_UNSUP, "unknown option"),
        })
    }

    fn reply(&mut self, option: OptionCode, reply: &OptionReply<'_>) {
        reply.encode(option, &mut self.out);
    }

    fn acknowledge(&mut self, option: OptionCode) -> Next<S> {
        self.reply(option, &OptionReply::Ack);
        Next::Option
    }

    fn agree(&mut self, option: OptionCode, mode: Mode) -> Next<S> {
        self.mode = mode;
        self.acknowledge(option)
    }

    fn refuse(&mut self, option: OptionCode, code: ReplyCode, message: &str) -> Next<S> {
        self.reply(option, &OptionReply::Error { code, message });
        Next::Option
    }

    fn refuse_unknown_export(&mut self, option: OptionCode) -> Next<S> {
        self.refuse(option, ReplyCode::ERR_UNKNOWN, "no export of that name")
    }

    fn contexts(
        &mut self,
        option: OptionCode,
        request: &MetaContextRequest<'_>,
        purpose: Purpose,
    ) -> Next<S> {
        if purpose == Purpose::Select {
            // A failed selection takes back the one before, too.
            self.selection = None;
        }
        if self.mode == Mode::Simple {
            return self.refuse(option, ReplyCode::ERR_INVALID, "structured replies have to be agreed first");
        }
        let Some(entry) = self.exports.find(request.export) else {
            return self.refuse_unknown_export(option);
        };
        let contexts = matching(&entry.export, &request.queries, purpose);
        for Selected { id, context } in &contexts {
            let id = if purpose == Purpose::Select { *id } else { ContextId(0) };
            self.reply(option, &OptionReply::MetaContext { id, name: &context.name() });
        }
        if purpose == Purpose::Select {
            self.selection = Some((entry, contexts));
        }
        self.acknowledge(option)
    }

    fn info(&mut self, option: OptionCode, request: &InfoRequest<'_>) -> Next<S> {
        let Some(entry) = self.exports.find(request.export) else {
            return self.refuse_unknown_export(option);
        };
        let only_info = option == OptionCode::INFO;
        let sizes_asked = request.infos.contains(&InfoType::BLOCK_SIZE);
        let (terms, contexts) = self.terms(&entry, sizes_asked);
        if request.infos.contains(&InfoType::NAME) {
            self.reply(option, &OptionReply::Info(Info::Name(&entry.name)));
        }
        if !entry.export.description.is_empty() {
            self.reply(option, &OptionReply::Info(Info::Description(&entry.export.description)));
        }
        // Who only looks sees the alignment that is best, and may promise to keep to it later.
        let sizes = entry.export.block_sizes(sizes_asked || only_info);
        self.reply(option, &OptionReply::Info(Info::BlockSize(sizes)));
        let flags = self.transmission_flags(&entry, terms.contexts > 0 || only_info);
        self.reply(option, &OptionReply::Info(Info::Export { size_bytes: terms.size_bytes, flags }));
        if only_info {
            return self.acknowledge(option);
        }
        match entry.begin() {
            Some(attached) => {
                self.reply(option, &OptionReply::Ack);
                Next::Transmission(Box::new(Negotiated { attached, terms, contexts }))
            }
            None => self.refuse_unknown_export(option),
        }
    }

    fn export_name(&mut self, name: &str) -> Result<Next<S>, Fault> {
        let refused = |why| Fault::Option { option: OptionCode::EXPORT_NAME, why };
        if self.mode == Mode::Extended {
            return Err(refused("extended headers rule it out"));
        }
        let entry = self.exports.find(name).ok_or(refused("no export of that name"))?;
        let (terms, contexts) = self.terms(&entry, false);
        let attached = entry.begin().ok_or(refused("no export of that name"))?;
        let flags = self.transmission_flags(&entry, false);
        let reply = ExportNameReply { size_bytes: terms.size_bytes, flags };
        reply.encode(self.flags.contains(ClientFlags::NO_ZEROES), &mut self.out);
        Ok(Next::Transmission(Box::new(Negotiated { attached, terms, contexts })))
    }

    /// What a session with `entry` would be measured by if it began now.
    fn terms(&self, entry: &Arc<Entry<S>>, sizes_asked: bool) -> (Terms, Vec<Selected>) {
        let contexts = match &self.selection {
            Some((selected_for, contexts)) if Arc::ptr_eq(selected_for, entry) => contexts.clone(),
            _ => Vec::new(),
        };
        let terms = Terms {
            headers: if self.mode == Mode::Extended { Headers::Extended } else { Headers::Compact },
            structured: self.mode >= Mode::Structured,
            writable: entry.export.writable,
            size_bytes: entry.export.storage.info().size_bytes,
            alignment: entry.export.block_sizes(sizes_asked).minimum_bytes,
            contexts: contexts.len(),
        };
        (terms, contexts)
    }

    fn transmission_flags(&self, entry: &Entry<S>, status_payload: bool) -> TransmissionFlags {
        entry
            .export
            .flags()
            .with(TransmissionFlags::SEND_DF, self.mode >= Mode::Structured)
            .with(TransmissionFlags::BLOCK_STATUS_PAYLOAD, self.mode == Mode::Extended && status_payload)
    }
}
