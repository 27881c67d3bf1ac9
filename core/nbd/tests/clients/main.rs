//! The server as other people's clients meet it: libnbd's tools and QEMU's, over unix sockets and TCP.
//!
//! A test that needs a tool which is not installed says so and passes.

mod fixture;
mod limits;
mod tools;
