//! Reading compressed clusters.

use super::{
    Qcow2, event,
    header::Compression,
    io::{FILE, Io},
};
use driveline_op::{Error, Result};
use std::{io::Read, sync::Arc};

/// Windows larger than any cluster are not needed, and would let an image take memory.
const ZSTD_WINDOW_LOG_MAX: u32 = 24;

/// Unpacks one cluster; `from` may be longer than what was packed.
pub(crate) fn unpack(compression: Compression, from: &[u8], into: &mut [u8]) -> std::io::Result<()> {
    match compression {
        Compression::Zlib => flate2::read::DeflateDecoder::new(from).read_exact(into),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(from)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            decoder.read_exact(into)
        }
    }
}

impl Qcow2 {
    /// The data of a compressed cluster. The last one is kept, because clusters are often read piece by piece.
    pub(crate) async fn unpacked(&self, io: &mut Io<'_, '_>, entry: u64) -> Result<Arc<[u8]>> {
        if let Some((_, data)) = self.unpacked.lock().as_ref().filter(|(of, _)| *of == entry) {
            return Ok(Arc::clone(data));
        }
        let (offset, length) = self.geometry.compressed(entry);
        let mut packed = vec![0; length as usize];
        io.tell(FILE, event::READ_COMPRESSED).await;
        self.file.read(io, offset, &mut packed).await?;
        let mut data = vec![0; self.geometry.cluster_bytes() as usize];
        unpack(self.compression, &packed, &mut data)
            .map_err(|error| Error::new(5, format_args!("the compressed cluster at {offset:#x}: {error}")))?;
        let data: Arc<[u8]> = data.into();
        *self.unpacked.lock() = Some((entry, Arc::clone(&data)));
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    #[test]
    fn what_follows_the_packed_data_does_not_matter() {
        let data: Vec<u8> = (0..65536u32).map(|i| (i / 100) as u8).collect();
        let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        deflate.write_all(&data).unwrap();
        let zstd = zstd::stream::encode_all(&data[..], 3).unwrap();
        for (compression, mut packed) in
            [(Compression::Zlib, deflate.finish().unwrap()), (Compression::Zstd, zstd)]
        {
            packed.extend([0xa5; 700]);
            let mut out = vec![0; data.len()];
            unpack(compression, &packed, &mut out).unwrap();
            assert!(out == data, "{compression:?}");
            assert!(unpack(compression, &packed[..packed.len() / 2], &mut out).is_err(), "{compression:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_unpack_or_fail(bytes: Vec<u8>) {
            for compression in [Compression::Zlib, Compression::Zstd] {
                let _ = unpack(compression, &bytes, &mut [0; 4096]);
            }
        }
    }
}
