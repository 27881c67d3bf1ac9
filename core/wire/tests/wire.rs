//! Properties of the codec: what is encoded decodes to the same, and no bytes at all make it panic.

use driveline_wire::*;
use proptest::prelude::*;

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9:._\u{e4}\u{20ac}-]{0,40}"
}

fn headers() -> impl Strategy<Value = Headers> {
    prop_oneof![Just(Headers::Compact), Just(Headers::Extended)]
}

fn message(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

proptest! {
    #[test]
    fn requests_survive(
        headers in headers(), flags: u16, command in 0u16..10, cookie: u64, offset: u64, length: u64,
    ) {
        let length = if headers == Headers::Compact { length & 0xffff_ffff } else { length };
        let request = Request {
            flags: CommandFlags(flags),
            command: Command(command),
            cookie: Cookie(cookie),
            offset,
            length,
        };
        let bytes = message(|out| request.encode(headers, out));
        prop_assert_eq!(bytes.len(), headers.request_length());
        prop_assert_eq!(parse(headers, &bytes), Ok(request));
        prop_assert!(parse(headers, &bytes[1..]).is_err());
    }

    #[test]
    fn handshake_messages_survive(a: u16, b: u32, c: u32, d: u64, e: u32, no_zeroes: bool) {
        let greeting = Greeting { flags: HandshakeFlags(a) };
        prop_assert_eq!(Greeting::decode(&message(|out| greeting.encode(out))), Ok(greeting));
        let flags = ClientFlags(b);
        prop_assert_eq!(ClientFlags::decode(&message(|out| flags.encode(out))), Ok(flags));
        let header = OptionHeader { option: OptionCode(b), length: c };
        prop_assert_eq!(OptionHeader::decode(&message(|out| header.encode(out))), Ok(header));
        let header = OptionReplyHeader { option: OptionCode(b), code: ReplyCode(c), length: e };
        prop_assert_eq!(OptionReplyHeader::decode(&message(|out| header.encode(out))), Ok(header));
        let reply = ExportNameReply { size_bytes: d, flags: TransmissionFlags(a) };
        let bytes = message(|out| reply.encode(no_zeroes, out));
        prop_assert_eq!(bytes.len(), ExportNameReply::length(no_zeroes));
        prop_assert_eq!(ExportNameReply::decode(&bytes, no_zeroes), Ok(reply));
        let reply = SimpleReply { errno: Errno(b), cookie: Cookie(d) };
        prop_assert_eq!(SimpleReply::decode(&message(|out| reply.encode(out))), Ok(reply));
    }

    #[test]
    fn options_survive(
        export in text(),
        infos in prop::collection::vec(any::<u16>(), 0..8),
        queries in prop::collection::vec(text(), 0..8),
        unknown in 12u32..,
    ) {
        let info = InfoRequest { export: &export, infos: infos.into_iter().map(InfoType).collect() };
        let meta = MetaContextRequest { export: &export, queries: queries.iter().map(String::as_str).collect() };
        for option in [
            OptionRequest::ExportName(&export),
            OptionRequest::Abort,
            OptionRequest::List,
            OptionRequest::StartTls,
            OptionRequest::Info(info.clone()),
            OptionRequest::Go(info),
            OptionRequest::StructuredReply,
            OptionRequest::ListMetaContext(meta.clone()),
            OptionRequest::SetMetaContext(meta),
            OptionRequest::ExtendedHeaders,
            OptionRequest::Unknown(OptionCode(unknown)),
        ] {
            let bytes = message(|out| option.encode(out));
            let (header, data) = bytes.split_at(OptionHeader::LENGTH);
            let header = OptionHeader::decode(header).unwrap();
            prop_assert_eq!(header.length as usize, data.len());
            prop_assert_eq!(OptionRequest::decode(header.option, data), Ok(option));
        }
    }

    #[test]
    fn option_replies_survive(name in text(), description in text(), id: u32, size_bytes: u64, flags: u16, code: u32) {
        for reply in [
            OptionReply::Ack,
            OptionReply::Server { name: &name, description: &description },
            OptionReply::Info(Info::Export { size_bytes, flags: TransmissionFlags(flags) }),
            OptionReply::Info(Info::Name(&name)),
            OptionReply::Info(Info::Description(&description)),
            OptionReply::Info(Info::BlockSize(BlockSizes {
                minimum_bytes: id,
                preferred_bytes: code,
                payload_bytes_max: u32::from(flags),
            })),
            OptionReply::Info(Info::Unknown(InfoType(flags | 4))),
            OptionReply::MetaContext { id: ContextId(id), name: &name },
            OptionReply::Error { code: ReplyCode(1 << 31 | code), message: &description },
        ] {
            let bytes = message(|out| reply.encode(OptionCode::GO, out));
            let (header, data) = bytes.split_at(OptionReplyHeader::LENGTH);
            let header = OptionReplyHeader::decode(header).unwrap();
            prop_assert_eq!(header.length as usize, data.len());
            prop_assert_eq!(OptionReply::decode(header.code, data), Ok(reply));
        }
    }

    #[test]
    fn chunks_survive(
        headers in headers(),
        cookie: u64, request_offset: u64, offset: u64,
        length in 1u32.., errno in 1u32.., context: u32,
        data in prop::collection::vec(any::<u8>(), 1..64),
        extents in prop::collection::vec((1u32.., any::<u32>()), 1..20),
        message_text in text(),
    ) {
        let extents: Vec<Extent> =
            extents.into_iter().map(|(length, status)| Extent { length: length.into(), status: status.into() }).collect();
        let encoded = |width| message(|out| extents.iter().for_each(|extent| extent.encode(width, out)));
        let (narrow, wide) = (encoded(ExtentWidth::Narrow), encoded(ExtentWidth::Wide));
        let context = ContextId(context);
        for chunk in [
            Chunk::None,
            Chunk::OffsetData { offset, data: &data },
            Chunk::OffsetHole { offset, length },
            Chunk::BlockStatus { context, extents: Extents::new(ExtentWidth::Narrow, &narrow).unwrap() },
            Chunk::BlockStatus { context, extents: Extents::new(ExtentWidth::Wide, &wide).unwrap() },
            Chunk::Error { errno: Errno(errno), message: &message_text, offset: None },
            Chunk::Error { errno: Errno(errno), message: &message_text, offset: Some(offset) },
        ] {
            let bytes =
                message(|out| chunk.encode(headers, ReplyFlags::DONE, Cookie(cookie), request_offset, out));
            let (header, payload) = bytes.split_at(ChunkHeader::length(headers));
            let header = ChunkHeader::decode(headers, header).unwrap();
            prop_assert_eq!(header.length as usize, payload.len());
            prop_assert_eq!(header.cookie, Cookie(cookie));
            prop_assert_eq!(header.offset, if headers == Headers::Extended { request_offset } else { 0 });
            let decoded = Chunk::decode(header.kind, payload);
            prop_assert_eq!(decoded, Ok(chunk));
            if let Ok(Chunk::BlockStatus { extents: view, .. }) = decoded {
                prop_assert_eq!(view.iter().collect::<Vec<_>>(), extents.clone());
            }
        }
    }

    #[test]
    fn a_data_header_is_that_of_its_chunk(headers in headers(), cookie: u64, offset: u64, data in prop::collection::vec(any::<u8>(), 1..64)) {
        let whole = message(|out| {
            Chunk::OffsetData { offset, data: &data }.encode(headers, ReplyFlags::DONE, Cookie(cookie), offset, out);
        });
        let mut parts = message(|out| {
            ChunkHeader { flags: ReplyFlags::DONE, kind: ChunkType::NONE, cookie: Cookie(cookie), offset, length: 0 }
                .encode_data(headers, offset, data.len() as u64, out);
        });
        parts.extend_from_slice(&data);
        prop_assert_eq!(parts, whole);
    }

    #[test]
    fn status_payloads_survive(effect_length: u64, ids in prop::collection::vec(any::<u32>(), 0..10)) {
        let ids: Vec<ContextId> = ids.into_iter().map(ContextId).collect();
        let bytes = message(|out| StatusPayload::encode(effect_length, &ids, out));
        let payload = StatusPayload::decode(&bytes).unwrap();
        prop_assert_eq!(payload.effect_length, effect_length);
        prop_assert_eq!(payload.ids().collect::<Vec<_>>(), ids);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz::decode_everything(&bytes);
    }
}

#[test]
fn a_string_of_4096_bytes_is_the_longest() {
    let name = "x".repeat(STRING_LENGTH_MAX + 1);
    let decode = |name: &str| OptionRequest::decode(OptionCode::EXPORT_NAME, name.as_bytes()).map(drop);
    assert_eq!(decode(&name[1..]), Ok(()));
    assert_eq!(decode(&name), Err(Malformed::StringTooLong { length: 4097 }));
    let announced = [0xff; 8];
    assert_eq!(
        OptionRequest::decode(OptionCode::GO, &announced),
        Err(Malformed::StringTooLong { length: 0xffff_ffff })
    );
}

#[test]
fn a_string_with_nul_or_without_utf8_is_refused() {
    for bytes in [&b"a\0b"[..], b"\xff"] {
        assert_eq!(OptionRequest::decode(OptionCode::EXPORT_NAME, bytes), Err(Malformed::NotText));
    }
}

#[test]
fn a_count_that_the_data_cannot_hold_is_truncated() {
    let mut data = Vec::new();
    data.extend_from_slice(&0u32.to_be_bytes());
    data.extend_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(
        OptionRequest::decode(OptionCode::SET_META_CONTEXT, &data),
        Err(Malformed::Truncated { missing: 4 })
    );
}

#[test]
fn options_without_data_refuse_data_except_abort() {
    for code in
        [OptionCode::LIST, OptionCode::STARTTLS, OptionCode::STRUCTURED_REPLY, OptionCode::EXTENDED_HEADERS]
    {
        assert!(OptionRequest::decode(code, b"").is_ok());
        assert_eq!(OptionRequest::decode(code, b"x"), Err(Malformed::Trailing { length: 1 }));
    }
    assert_eq!(OptionRequest::decode(OptionCode::ABORT, b"x"), Ok(OptionRequest::Abort));
}

#[test]
fn a_write_has_a_payload_and_other_commands_when_the_flag_says_so() {
    let mut request = Request {
        flags: CommandFlags::EMPTY,
        command: Command::WRITE,
        cookie: Cookie(0),
        offset: 0,
        length: 5,
    };
    assert_eq!(request.payload_length(Headers::Compact), 5);
    assert_eq!(request.payload_length(Headers::Extended), 5, "as QEMU's client sends it");
    request = Request { command: Command(99), ..request };
    assert_eq!(request.payload_length(Headers::Extended), 0);
    request = Request { flags: CommandFlags::PAYLOAD_LEN, command: Command(99), ..request };
    assert_eq!(request.payload_length(Headers::Compact), 0);
    assert_eq!(request.payload_length(Headers::Extended), 5);
}

#[test]
fn flags_and_codes_print_by_name() {
    assert_eq!(format!("{:?}", CommandFlags::FUA | CommandFlags(1 << 9)), "FUA|0x200");
    assert_eq!(format!("{:?}", CommandFlags::EMPTY), "0x0");
    assert_eq!(format!("{:?} {:?}", Command::TRIM, Command(77)), "TRIM Command(0x4d)");
    assert_eq!(ReplyCode::ERR_TOO_BIG.to_string(), "ERR_TOO_BIG");
}
