//! Writes that ask to be stored compressed.
//!
//! Only whole clusters can be (and the last one, when the disk ends inside it). What else there is of a request is written as
//! it is: how data is stored is a wish, that it is stored is not. (QEMU refuses such a request.)

use super::{Qcow2, io::Io, packing::pack, write::Payload};
use driveline_op::{Error, Result, WriteRequest, flag};

impl Qcow2 {
    /// Writes whole clusters compressed where they become smaller by that, and the rest as it is.
    pub(crate) async fn write_compressing(
        &self,
        io: &mut Io<'_, '_>,
        request: &WriteRequest<'_>,
    ) -> Result<()> {
        {
            let _pin = self.epoch.pin();
            let (cluster_bytes, range) = (self.geometry.cluster_bytes(), request.range());
            let mut cluster = vec![0; cluster_bytes as usize];
            let mut at = range.start;
            while at < range.end {
                let start = self.geometry.align_down(at);
                let end = (start + cluster_bytes).min(self.size_bytes());
                let part = at..end.min(range.end);
                let length = (part.end - part.start) as usize;
                let from = part.start - range.start;
                if part == (start..end) {
                    // The guest's memory may change while it is packed.
                    request.copy_to(from, &mut cluster[..length]);
                    cluster[length..].fill(0);
                    let packed = pack(self.compression, &cluster).map_err(|error| {
                        Error::IO.because(format_args!("compressing {length} bytes: {error}"))
                    })?;
                    match packed {
                        Some(packed) => self.write_packed(io, start, &packed).await?,
                        None => {
                            self.write_plain(io, Payload::Bytes(&cluster[..length], 0), part.clone()).await?
                        }
                    }
                } else {
                    self.write_plain(io, Payload::Of(request, from), part.clone()).await?;
                }
                at = part.end;
            }
        }
        if request.flags() & flag::FUA != 0 { self.flush_all(io).await } else { Ok(()) }
    }
}
