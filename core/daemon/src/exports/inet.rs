//! Where a monitor has its server listen on TCP: one of several ports, and one of the families.
//!
//! Source: QEMU's util/qemu-sockets.c, and what its storage daemon answers.

use super::sockets::Unheard;
use driveline_engine::net::{TcpListener, TcpOptions};
use driveline_qmp::Inet;
use std::{
    io::Error,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
};

/// What is said of no port at all, as in QEMU.
const ADDRESS_IN_USE: i32 = 98;

/// Listens on the first address and port that can be had.
pub(super) fn bind(inet: &Inet) -> Result<TcpListener, Unheard> {
    let (ipv4, ipv6) = families(inet);
    let addresses = resolve(inet)?.into_iter().filter(|found| if found.is_ipv4() { ipv4 } else { ipv6 });
    let addresses: Vec<SocketAddr> = addresses.collect();
    if addresses.is_empty() {
        let is_number = inet.host.parse::<std::net::IpAddr>().is_ok();
        let why =
            if is_number { "Address family for hostname not supported" } else { "Name or service not known" };
        return Err(Unheard::Name(Error::other(why)));
    }
    let options = TcpOptions { only_ipv6: !ipv4, keep_alive: inet.keep_alive };
    let mut last = Error::from_raw_os_error(ADDRESS_IN_USE);
    for address in addresses {
        for port in inet.port..=inet.to.unwrap_or(inet.port) {
            match TcpListener::bind_with(SocketAddr::new(address.ip(), port), options) {
                Ok(listener) => return Ok(listener),
                Err(error) => last = error,
            }
        }
    }
    Err(Unheard::Io(last))
}

/// Which families are wanted: to ask for one leaves the other out, unless that is asked for too.
fn families(inet: &Inet) -> (bool, bool) {
    match (inet.ipv4, inet.ipv6) {
        (None, None) => (true, true),
        (ipv4, ipv6) => (ipv4.unwrap_or(ipv6 == Some(false)), ipv6.unwrap_or(ipv4 == Some(false))),
    }
}

/// No host is any address: of IPv6, whose socket takes clients of IPv4 as well, where the system has it.
fn resolve(inet: &Inet) -> Result<Vec<SocketAddr>, Unheard> {
    if inet.host.is_empty() {
        let any = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
        return Ok(any.map(|ip| SocketAddr::new(ip, inet.port)).to_vec());
    }
    let found = (&*inet.host, inet.port).to_socket_addrs().map_err(Unheard::Name)?;
    Ok(found.collect())
}
