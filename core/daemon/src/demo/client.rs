//! A small NBD client: one connection, one request at a time.

use driveline_engine::net::{Stream, UnixStream};
use driveline_nbd::wire::{
    ClientFlags, Command, CommandFlags, Cookie, ExportNameReply, Greeting, Headers, OptionHeader,
    OptionRequest, Request, SimpleReply,
};
use std::{io, path::Path};

/// A connection to an export.
#[derive(Debug)]
pub(crate) struct Client {
    stream: Stream,
    size_bytes: u64,
    next: u64,
}

fn wrong(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

impl Client {
    /// Connects to an export on a unix socket.
    pub(crate) async fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let mut greeting = [0; Greeting::LENGTH];
        stream.read_exact(&mut greeting).await?;
        Greeting::decode(&greeting).map_err(wrong)?;
        let mut out = Vec::new();
        ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES, true).encode(&mut out);
        // The oldest way to choose an export, and the shortest.
        let choose = OptionRequest::ExportName(export);
        OptionHeader { option: choose.code(), length: export.len() as u32 }.encode(&mut out);
        out.extend_from_slice(export.as_bytes());
        stream.write_all(&out).await?;
        let mut reply = [0; ExportNameReply::length(true)];
        stream.read_exact(&mut reply).await?;
        let reply = ExportNameReply::decode(&reply, true).map_err(wrong)?;
        Ok(Self { stream, size_bytes: reply.size_bytes, next: 0 })
    }

    /// The size of the export.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Writes, and waits until it is done.
    pub(crate) async fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.call(Command::WRITE, offset, data.len() as u64, data).await
    }

    /// Reads.
    pub(crate) async fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.call(Command::READ, offset, data.len() as u64, &[]).await?;
        self.stream.read_exact(data).await
    }

    /// Says goodbye.
    pub(crate) async fn disconnect(mut self) -> io::Result<()> {
        self.send(Command::DISC, 0, 0, &[]).await.map(drop)
    }

    async fn send(&mut self, command: Command, offset: u64, length: u64, data: &[u8]) -> io::Result<Cookie> {
        self.next += 1;
        let cookie = Cookie(self.next);
        let mut out = Vec::with_capacity(Headers::Compact.request_length() + data.len());
        Request { flags: CommandFlags::EMPTY, command, cookie, offset, length }
            .encode(Headers::Compact, &mut out);
        out.extend_from_slice(data);
        self.stream.write_all(&out).await?;
        Ok(cookie)
    }

    async fn call(&mut self, command: Command, offset: u64, length: u64, data: &[u8]) -> io::Result<()> {
        let cookie = self.send(command, offset, length, data).await?;
        let mut reply = [0; SimpleReply::LENGTH];
        self.stream.read_exact(&mut reply).await?;
        let reply = SimpleReply::decode(&reply).map_err(wrong)?;
        if reply.cookie != cookie {
            return Err(wrong("an answer to another request"));
        }
        match reply.errno.0 {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }
}
