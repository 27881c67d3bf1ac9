//! A guest: a blocking NBD client, written against the protocol's text and not against our codec.

use std::{
    io::{Read, Result, Write},
    os::unix::net::UnixStream,
    path::Path,
};

/// A connection to an export.
pub(crate) struct Guest {
    stream: UnixStream,
    /// Bytes.
    pub(crate) size: u64,
    cookie: u64,
}

const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;

impl Guest {
    pub(crate) fn connect(socket: &Path, export: &str) -> Self {
        Self::try_connect(socket, export).expect("an export can be opened")
    }

    pub(crate) fn try_connect(socket: &Path, export: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3u32.to_be_bytes())?; // fixed newstyle, no zeroes
        let mut go = b"IHAVEOPT".to_vec();
        go.extend(OPTION_GO.to_be_bytes());
        go.extend((export.len() as u32 + 6).to_be_bytes());
        go.extend((export.len() as u32).to_be_bytes());
        go.extend(export.as_bytes());
        go.extend(0u16.to_be_bytes());
        stream.write_all(&go)?;
        let mut size = 0;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut data = vec![0; u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize];
            stream.read_exact(&mut data)?;
            match kind {
                REPLY_ACK => return Ok(Self { stream, size, cookie: 0 }),
                REPLY_INFO if data[..2] == [0, 0] => {
                    size = u64::from_be_bytes(data[2..10].try_into().unwrap())
                }
                REPLY_INFO => {}
                other => panic!("the server refused: {other:#x} {}", String::from_utf8_lossy(&data)),
            }
        }
    }

    fn request(&mut self, flags: u16, command: u16, offset: u64, length: u32, data: &[u8]) -> Result<u32> {
        self.cookie += 1;
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        assert_eq!(reply[8..16], self.cookie.to_be_bytes(), "one request at a time, one reply");
        Ok(u32::from_be_bytes(reply[4..8].try_into().unwrap()))
    }

    fn done(errno: Result<u32>) -> Result<()> {
        match errno? {
            0 => Ok(()),
            errno => Err(std::io::Error::from_raw_os_error(errno as i32)),
        }
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        Self::done(self.request(0, 0, offset, length, &[]))?;
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        Self::done(self.request(0, 1, offset, data.len() as u32, data))
    }

    pub(crate) fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<()> {
        Self::done(self.request(0, 6, offset, length, &[]))
    }

    pub(crate) fn trim(&mut self, offset: u64, length: u32) -> Result<()> {
        Self::done(self.request(0, 4, offset, length, &[]))
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        Self::done(self.request(0, 3, 0, 0, &[]))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut bye = 0x2560_9513u32.to_be_bytes().to_vec();
        bye.extend([0, 0, 0, 2]);
        bye.extend([0; 20]);
        let _ = self.stream.write_all(&bye);
    }
}
