//! One entry that sends bytes through every decoder: shared by the fuzz target and by the test that runs without it.

use super::*;

/// Decodes `bytes` as each message there is, and encodes again what was understood.
///
/// Nothing may panic, and whatever was understood must mean the same after another round.
pub fn decode_everything(bytes: &[u8]) {
    let _ = Greeting::decode(bytes);
    let _ = ClientFlags::decode(bytes);
    let _ = OptionHeader::decode(bytes);
    let _ = OptionReplyHeader::decode(bytes);
    let _ = SimpleReply::decode(bytes);
    let _ = StatusPayload::decode(bytes).map(|payload| payload.ids().count());
    for headers in [Headers::Compact, Headers::Extended] {
        let _ = ExportNameReply::decode(bytes, headers == Headers::Compact);
        let _ = ChunkHeader::decode(headers, bytes);
        if let Ok(request) = parse(headers, bytes) {
            let mut again = Vec::new();
            request.encode(headers, &mut again);
            assert_eq!(again, bytes);
        }
    }
    for code in 0..=12 {
        option(OptionCode(code), bytes);
        option_reply(ReplyCode(code), bytes);
        option_reply(ReplyCode(1 << 31 | code), bytes);
        chunk(ChunkType(code as u16), bytes);
        chunk(ChunkType(1 << 15 | code as u16), bytes);
    }
}

fn option(code: OptionCode, data: &[u8]) {
    let Ok(request) = OptionRequest::decode(code, data) else { return };
    let mut again = Vec::new();
    request.encode(&mut again);
    assert_eq!(OptionRequest::decode(code, &again[OptionHeader::LENGTH..]), Ok(request));
}

fn option_reply(code: ReplyCode, data: &[u8]) {
    let Ok(reply) = OptionReply::decode(code, data) else { return };
    let mut again = Vec::new();
    reply.encode(OptionCode::GO, &mut again);
    let data = &again[OptionReplyHeader::LENGTH..];
    assert_eq!(OptionReply::decode(code, data), Ok(reply));
}

fn chunk(kind: ChunkType, payload: &[u8]) {
    let Ok(chunk) = Chunk::decode(kind, payload) else { return };
    if let Chunk::BlockStatus { extents, .. } = chunk {
        assert_eq!(extents.iter().count(), extents.count());
    }
    let mut again = Vec::new();
    chunk.encode(Headers::Extended, ReplyFlags::DONE, Cookie(1), 2, &mut again);
    let payload = &again[ChunkHeader::length(Headers::Extended)..];
    assert_eq!(Chunk::decode(kind, payload), Ok(chunk));
}
