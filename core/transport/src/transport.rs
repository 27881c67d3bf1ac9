//! What is needed of a connection.

use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};

use driveline_engine::net::Stream;

/// A connected, ordered stream of bytes: a socket, or a pipe in a test.
///
/// One reader and one writer use it at the same time, from one thread.
pub trait Transport {
    /// Reads what there is, at least one byte, into `parts` in order. Returns how many bytes; 0 is the end of the stream.
    ///
    /// Dropping the future loses no bytes.
    fn read(&self, parts: &mut [IoSliceMut<'_>]) -> impl Future<Output = io::Result<usize>>;

    /// Writes all of `parts`, in order.
    ///
    /// Dropping the future, or an error, leaves the connection of no more use.
    fn write_all(&self, parts: &[IoSlice<'_>]) -> impl Future<Output = io::Result<()>>;
}

impl Transport for Stream {
    fn read(&self, parts: &mut [IoSliceMut<'_>]) -> impl Future<Output = io::Result<usize>> {
        self.read_vectored(parts)
    }

    fn write_all(&self, parts: &[IoSlice<'_>]) -> impl Future<Output = io::Result<()>> {
        self.write_all_vectored(parts)
    }
}

impl<T: Transport> Transport for &T {
    fn read(&self, parts: &mut [IoSliceMut<'_>]) -> impl Future<Output = io::Result<usize>> {
        (**self).read(parts)
    }

    fn write_all(&self, parts: &[IoSlice<'_>]) -> impl Future<Output = io::Result<()>> {
        (**self).write_all(parts)
    }
}
