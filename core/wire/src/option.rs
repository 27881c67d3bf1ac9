//! The options of a client and their data.

use super::reader::{Malformed, Reader, put_string_u32};
use super::{InfoType, OptionCode, OptionHeader};

/// An option with its data understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionRequest<'a> {
    /// Start transmission with this export.
    ExportName(&'a str),
    /// End the session. Data is allowed and means nothing.
    Abort,
    /// Name all exports.
    List,
    /// Upgrade to TLS.
    StartTls,
    /// Describe an export.
    Info(InfoRequest<'a>),
    /// Describe an export and start transmission with it.
    Go(InfoRequest<'a>),
    /// Use structured replies.
    StructuredReply,
    /// Name the metadata contexts that match.
    ListMetaContext(MetaContextRequest<'a>),
    /// Select the metadata contexts that match.
    SetMetaContext(MetaContextRequest<'a>),
    /// Use extended headers.
    ExtendedHeaders,
    /// An option that has no meaning here; its data is of no interest.
    Unknown(OptionCode),
}

/// Data of [`OptionRequest::Info`] and [`OptionRequest::Go`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export; empty means the default one.
    pub export: &'a str,
    /// What the client wants to know beyond size and flags.
    pub infos: Vec<InfoType>,
}

/// Data of [`OptionRequest::ListMetaContext`] and [`OptionRequest::SetMetaContext`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// The export; empty means the default one.
    pub export: &'a str,
    /// Names or wildcards of contexts.
    pub queries: Vec<&'a str>,
}

impl<'a> OptionRequest<'a> {
    /// Understands the data of `option`.
    ///
    /// Errors: [`Malformed`]; [`Malformed::StringTooLong`] is to be answered with `ERR_TOO_BIG`, all else with
    /// `ERR_INVALID`. What is allocated is bounded by `data`.
    pub fn decode(option: OptionCode, data: &'a [u8]) -> Result<OptionRequest<'a>, Malformed> {
        let mut reader = Reader::new(data);
        let request = match option {
            OptionCode::EXPORT_NAME => OptionRequest::ExportName(reader.string_rest()?),
            OptionCode::ABORT => return Ok(OptionRequest::Abort),
            OptionCode::LIST => OptionRequest::List,
            OptionCode::STARTTLS => OptionRequest::StartTls,
            OptionCode::INFO => OptionRequest::Info(InfoRequest::decode(&mut reader)?),
            OptionCode::GO => OptionRequest::Go(InfoRequest::decode(&mut reader)?),
            OptionCode::STRUCTURED_REPLY => OptionRequest::StructuredReply,
            OptionCode::LIST_META_CONTEXT => {
                OptionRequest::ListMetaContext(MetaContextRequest::decode(&mut reader)?)
            }
            OptionCode::SET_META_CONTEXT => {
                OptionRequest::SetMetaContext(MetaContextRequest::decode(&mut reader)?)
            }
            OptionCode::EXTENDED_HEADERS => OptionRequest::ExtendedHeaders,
            other => return Ok(OptionRequest::Unknown(other)),
        };
        reader.finish()?;
        Ok(request)
    }

    /// Which option this is.
    pub fn code(&self) -> OptionCode {
        match self {
            OptionRequest::ExportName(_) => OptionCode::EXPORT_NAME,
            OptionRequest::Abort => OptionCode::ABORT,
            OptionRequest::List => OptionCode::LIST,
            OptionRequest::StartTls => OptionCode::STARTTLS,
            OptionRequest::Info(_) => OptionCode::INFO,
            OptionRequest::Go(_) => OptionCode::GO,
            OptionRequest::StructuredReply => OptionCode::STRUCTURED_REPLY,
            OptionRequest::ListMetaContext(_) => OptionCode::LIST_META_CONTEXT,
            OptionRequest::SetMetaContext(_) => OptionCode::SET_META_CONTEXT,
            OptionRequest::ExtendedHeaders => OptionCode::EXTENDED_HEADERS,
            OptionRequest::Unknown(code) => *code,
        }
    }

    /// Appends the option with its header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        OptionHeader { option: self.code(), length: 0 }.encode(out);
        let data = out.len();
        match self {
            OptionRequest::ExportName(name) => out.extend_from_slice(name.as_bytes()),
            OptionRequest::Info(request) | OptionRequest::Go(request) => request.encode(out),
            OptionRequest::ListMetaContext(request) | OptionRequest::SetMetaContext(request) => {
                request.encode(out);
            }
            _ => {}
        }
        let length = (out.len() - data) as u32;
        out[start + 12..data].copy_from_slice(&length.to_be_bytes());
    }
}

impl<'a> InfoRequest<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<InfoRequest<'a>, Malformed> {
        let export = reader.string_u32()?;
        let count = reader.u16()?;
        let infos = (0..count).map(|_| reader.u16().map(InfoType)).collect::<Result<_, _>>()?;
        Ok(InfoRequest { export, infos })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        debug_assert!(self.infos.len() <= usize::from(u16::MAX));
        put_string_u32(out, self.export);
        out.extend_from_slice(&(self.infos.len() as u16).to_be_bytes());
        for info in &self.infos {
            out.extend_from_slice(&info.0.to_be_bytes());
        }
    }
}

impl<'a> MetaContextRequest<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<MetaContextRequest<'a>, Malformed> {
        let export = reader.string_u32()?;
        let count = reader.u32()? as usize;
        // Each query needs four bytes at least: a count that the data cannot hold must not reserve memory.
        let mut queries = Vec::with_capacity(count.min(reader.remaining() / 4));
        for _ in 0..count {
            queries.push(reader.string_u32()?);
        }
        Ok(MetaContextRequest { export, queries })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_string_u32(out, self.export);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            put_string_u32(out, query);
        }
    }
}
