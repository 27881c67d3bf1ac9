//! What is agreed, and what is refused.

use driveline_nbd::wire::*;
use driveline_nbd::{AddError, Export, Exports, Fault};
use driveline_op::Info as StorageInfo;

use crate::client::{Client, Mode, Reply};
use crate::memory::Memory;
use crate::{connect, exports_of};

fn codes(replies: &[Reply]) -> Vec<ReplyCode> {
    replies.iter().map(|reply| reply.code).collect()
}

#[test]
fn list_names_all_exports_with_their_descriptions() {
    let exports = exports_of(Memory::new(4096));
    let described = Export { description: "the second".into(), ..Export::new(Memory::new(0)) };
    exports.add("another", described).unwrap();
    connect(&exports, async |pipe| {
        let mut client = Client::greet(pipe).await;
        let replies = client.option(&OptionRequest::List).await;
        let meanings: Vec<_> = replies.iter().map(Reply::meaning).collect();
        assert_eq!(
            meanings,
            [
                OptionReply::Server { name: "another", description: "the second" },
                OptionReply::Server { name: "disk", description: "" },
                OptionReply::Ack,
            ]
        );
        assert_eq!(client.option(&OptionRequest::Abort).await.len(), 1);
    })
    .0
    .unwrap();
}

#[test]
fn info_describes_and_go_begins() {
    let info = StorageInfo { size_bytes: 1 << 20, request_alignment: 512, ..StorageInfo::default() };
    let exports = exports_of(Memory::with_info(info));
    connect(&exports, async |pipe| {
        let mut client = Client::greet(pipe).await;
        client.agree(Mode::Extended).await;
        let infos = vec![InfoType::BLOCK_SIZE, InfoType::NAME, InfoType(99)];
        // The empty name means the only export.
        let request = InfoRequest { export: "", infos };
        let replies = client.option(&OptionRequest::Info(request)).await;
        let meanings: Vec<_> = replies.iter().map(Reply::meaning).collect();
        let flags = TransmissionFlags::KNOWN.beyond(
            TransmissionFlags::READ_ONLY | TransmissionFlags::ROTATIONAL | TransmissionFlags::SEND_RESIZE,
        );
        assert_eq!(
            meanings,
            [
                OptionReply::Info(Info::Name("disk")),
                OptionReply::Info(Info::BlockSize(BlockSizes {
                    minimum_bytes: 512,
                    preferred_bytes: 4096,
                    payload_bytes_max: 32 << 20,
                })),
                OptionReply::Info(Info::Export { size_bytes: 1 << 20, flags }),
                OptionReply::Ack,
            ]
        );
        // Who does not ask for block sizes is not held to them.
        let request = InfoRequest { export: "disk", infos: vec![] };
        assert_eq!(client.option(&OptionRequest::Go(request)).await.last().unwrap().code, ReplyCode::ACK);
        assert_eq!(client.write(3, b"unaligned").await.errno, Errno::OK);
        client.leave().await;
    })
    .0
    .unwrap();
}

#[test]
fn block_sizes_bind_those_who_asked() {
    let info = StorageInfo { size_bytes: 1 << 20, request_alignment: 512, ..StorageInfo::default() };
    let exports = exports_of(Memory::with_info(info));
    connect(&exports, async |pipe| {
        let mut client = Client::go(pipe, Mode::Simple, &[]).await;
        assert_eq!(client.write(3, b"unaligned").await.errno, Errno::EINVAL);
        assert_eq!(client.write(512, &[1; 512]).await.errno, Errno::OK);
    })
    .0
    .unwrap();
}

#[test]
fn export_name_begins_without_further_ado() {
    for no_zeroes in [false, true] {
        let exports = exports_of(Memory::new(4096));
        connect(&exports, async |pipe| {
            let mut client =
                Client::greet_with(pipe, ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES, no_zeroes))
                    .await;
            let mut out = Vec::new();
            OptionRequest::ExportName("disk").encode(&mut out);
            client.send(&out).await.unwrap();
            let reply = client.receive(ExportNameReply::length(no_zeroes)).await.unwrap();
            let reply = ExportNameReply::decode(&reply, no_zeroes).unwrap();
            assert_eq!(reply.size_bytes, 4096);
            assert!(!reply.flags.contains(TransmissionFlags::SEND_DF));
            assert_eq!(client.read(0, 512).await.data, [0; 512]);
            client.leave().await;
        })
        .0
        .unwrap();
    }
}

#[test]
fn a_wrong_export_name_ends_the_connection_and_a_wrong_go_does_not() {
    let exports = exports_of(Memory::new(4096));
    let (outcome, ()) = connect(&exports, async |pipe| {
        let mut client = Client::greet(pipe).await;
        let request = InfoRequest { export: "nothing", infos: vec![] };
        let replies = client.option(&OptionRequest::Go(request)).await;
        assert_eq!(codes(&replies), [ReplyCode::ERR_UNKNOWN]);
        assert!(client.raw_option(OptionCode::EXPORT_NAME, b"nothing").await.is_err());
    });
    assert!(matches!(outcome, Err(Fault::Option { option: OptionCode::EXPORT_NAME, .. })));
}

#[test]
fn the_empty_name_is_ambiguous_among_several_unless_one_has_it() {
    let exports = exports_of(Memory::new(4096));
    exports.add("other", Export::new(Memory::new(8192))).unwrap();
    let size = |exports: &Exports<Memory>| {
        connect(exports, async |pipe| {
            let mut client = Client::greet(pipe).await;
            let replies =
                client.option(&OptionRequest::Info(InfoRequest { export: "", infos: vec![] })).await;
            replies.iter().find_map(|reply| match reply.meaning() {
                OptionReply::Info(Info::Export { size_bytes, .. }) => Some(size_bytes),
                _ => None,
            })
        })
        .1
    };
    assert_eq!(size(&exports), None);
    exports.add("", Export::new(Memory::new(512))).unwrap();
    assert_eq!(size(&exports), Some(512));
}

#[test]
fn options_of_any_wrong_shape_are_refused_and_the_next_one_works() {
    let exports = exports_of(Memory::new(4096));
    connect(&exports, async |pipe| {
        let mut client = Client::greet(pipe).await;
        let cases: [(OptionCode, &[u8], ReplyCode); 13] = [
            (OptionCode::LIST, b"x", ReplyCode::ERR_INVALID),
            (OptionCode::STARTTLS, b"", ReplyCode::ERR_POLICY),
            (OptionCode::STARTTLS, b"x", ReplyCode::ERR_INVALID),
            (OptionCode::STRUCTURED_REPLY, b"x", ReplyCode::ERR_INVALID),
            (OptionCode::EXTENDED_HEADERS, b"x", ReplyCode::ERR_INVALID),
            (OptionCode::PEEK_EXPORT, b"x", ReplyCode::ERR_UNSUP),
            (OptionCode(4711), &[7; 1000], ReplyCode::ERR_UNSUP),
            (OptionCode::GO, b"", ReplyCode::ERR_INVALID),
            (OptionCode::GO, &[0, 0, 0, 4, b'd', b'i', b's', b'k', 0, 1, 0], ReplyCode::ERR_INVALID),
            (OptionCode::INFO, &[0, 0, 0, 1, 0xff, 0, 0], ReplyCode::ERR_INVALID),
            (OptionCode::INFO, &[0, 1, 0, 0, 0, 0], ReplyCode::ERR_TOO_BIG),
            // Structured replies were not agreed.
            (OptionCode::LIST_META_CONTEXT, &[0; 8], ReplyCode::ERR_INVALID),
            (OptionCode::LIST, &[0; 1 << 20], ReplyCode::ERR_TOO_BIG),
        ];
        for (option, data, code) in cases {
            let replies = client.raw_option(option, data).await.unwrap();
            assert_eq!(codes(&replies), [code], "{option} with {} bytes", data.len());
        }
        client.agree(Mode::Structured).await;
        assert_eq!(codes(&client.option(&OptionRequest::StructuredReply).await), [ReplyCode::ERR_INVALID]);
        client.agree(Mode::Extended).await;
        assert_eq!(codes(&client.option(&OptionRequest::ExtendedHeaders).await), [ReplyCode::ERR_INVALID]);
        assert_eq!(
            codes(&client.option(&OptionRequest::StructuredReply).await),
            [ReplyCode::ERR_EXT_HEADER_REQD]
        );
        let contexts =
            |export, queries| OptionRequest::SetMetaContext(MetaContextRequest { export, queries });
        assert_eq!(codes(&client.option(&contexts("nothing", vec![])).await), [ReplyCode::ERR_UNKNOWN]);
        assert_eq!(codes(&client.option(&contexts("disk", vec!["base:"])).await), [ReplyCode::ACK]);
        assert_eq!(
            codes(&client.option(&contexts("disk", vec!["x:y", "base:allocation"])).await),
            [ReplyCode::META_CONTEXT, ReplyCode::ACK]
        );
        assert_eq!(codes(&client.option(&OptionRequest::Abort).await), [ReplyCode::ACK]);
        assert!(client.receive(1).await.is_err());
    })
    .0
    .unwrap();
}

#[test]
fn contexts_hold_only_for_the_export_that_they_were_selected_for() {
    let exports = exports_of(Memory::new(4096));
    exports.add("other", Export::new(Memory::new(4096))).unwrap();
    connect(&exports, async |pipe| {
        let mut client = Client::greet(pipe).await;
        client.agree(Mode::Structured).await;
        let request = MetaContextRequest { export: "other", queries: vec!["base:allocation"] };
        client.option(&OptionRequest::SetMetaContext(request)).await;
        client.option(&OptionRequest::Go(InfoRequest { export: "disk", infos: vec![] })).await;
        let answer = client.call(Command::BLOCK_STATUS, CommandFlags::EMPTY, 0, 4096, &[]).await;
        assert_eq!(answer.errno, Errno::EINVAL);
    })
    .0
    .unwrap();
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let exports = exports_of(Memory::new(4096));
    let (outcome, ()) = connect(&exports, async |pipe| {
        let client = Client::greet_with(pipe, ClientFlags(4)).await;
        assert!(client.receive(1).await.is_err());
    });
    assert!(matches!(outcome, Err(Fault::ClientFlags { flags: 4 })));
}

#[test]
fn without_fixed_newstyle_only_export_name_works() {
    let exports = exports_of(Memory::new(4096));
    let (outcome, ()) = connect(&exports, async |pipe| {
        let mut client = Client::greet_with(pipe, ClientFlags::EMPTY).await;
        assert!(client.raw_option(OptionCode::LIST, b"").await.is_err());
    });
    assert!(matches!(outcome, Err(Fault::Option { option: OptionCode::LIST, .. })));
}

#[test]
fn a_read_only_export_says_so() {
    let exports = Exports::default();
    exports.add("disk", Export::new(Memory::new(4096))).unwrap();
    connect(&exports, async |pipe| {
        let mut client = Client::go(pipe, Mode::Structured, &[]).await;
        let writing = TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO;
        assert!(client.flags.contains(TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN));
        assert!((client.flags & writing).is_empty());
        let answer = client.write(0, b"no").await;
        assert_eq!((answer.errno, &*answer.message), (Errno::EPERM, "the export is read-only"));
        assert_eq!(client.read(0, 2).await.data, [0; 2]);
    })
    .0
    .unwrap();
}

#[test]
fn names_are_unique_and_text() {
    let exports = exports_of(Memory::new(1));
    let add = |name: &str| exports.add(name, Export::new(Memory::new(1)));
    assert_eq!(add("disk"), Err(AddError::Exists { name: "disk".into() }));
    assert_eq!(add("a\0b"), Err(AddError::Text { what: "the name" }));
    assert_eq!(add(&"x".repeat(4097)), Err(AddError::Text { what: "the name" }));
    assert_eq!(exports.names(), ["disk"]);
}
