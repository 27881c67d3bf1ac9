//! Stream sockets, unix and TCP.
//!
//! Every call is tried without blocking first; what would block waits for readiness in the thread's ring or epoll. No
//! buffer is ever in the kernel's hands between two polls, so the API is safe and cancelling is free.

mod connect;
mod listener;
mod stream;

pub use connect::{TcpStream, UnixStream};
pub use listener::{Listener, TcpListener, TcpOptions, UnixListener};
pub use stream::{ReadHalf, Stream, WriteHalf};
