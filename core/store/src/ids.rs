//! Which store, and which boot of which machine.

use core::fmt;
use std::fs;
use std::io;

/// Tells stores apart, wherever their files are. A copy of a file is the same store; one made to re-bind is another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// A random one.
    pub(crate) fn random() -> Self {
        let mut bytes: [u8; 16] = rand::random();
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Uuid(bytes)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if [4, 6, 8, 10].contains(&at) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One run of one kernel. What the page cache held is there as long as this stays the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// The kernel that runs now.
    ///
    /// Errors: `/proc/sys/kernel/random/boot_id` cannot be read, or holds no 32 hexadecimal digits.
    pub fn current() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        match u128::from_str_radix(&digits, 16) {
            Ok(number) if digits.len() == 32 => Ok(BootId(number.to_be_bytes())),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("boot id {text:?}"))),
        }
    }
}

impl fmt::Debug for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Uuid(self.0), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_as_the_kernel_does() {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert_eq!(format!("{:?}", BootId::current().unwrap()), text.trim());
        assert_ne!(Uuid::random(), Uuid::random());
    }
}
