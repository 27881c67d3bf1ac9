//! What a store says of itself: whose bitmaps it has, where they belong, and what the images looked like.

use super::{Owner, place::Place};
use driveline_store::Fingerprint;
use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
};

/// The owner section of a store: strings, each after its length (4 bytes, big endian): the kind of the owner, its name,
/// the kind of the place, its node, its path; how many names follow (4 bytes), and those of bitmaps in the image whose
/// contents were lost before; then the fingerprint of the images, to the end.
#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) owner: Owner,
    pub(crate) place: Place,
    /// Bitmaps in the image whose contents are lost, and which nobody removed. What else the image says to be in use, and is
    /// not in the store, was removed.
    pub(crate) lost: Vec<String>,
    /// The files of its images; if the store was closed in good order, as they were then.
    pub(crate) images: Fingerprint,
}

impl Owned {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |part: &[u8]| {
            bytes.extend((part.len() as u32).to_be_bytes());
            bytes.extend(part);
        };
        let kind: &[u8] = if matches!(self.owner, Owner::Drive(_)) { b"drive" } else { b"node" };
        put(kind);
        put(self.owner.name().as_bytes());
        match &self.place {
            Place::Image { node, file } => {
                put(b"qcow2");
                put(node.as_bytes());
                put(file.as_os_str().as_bytes());
            }
            Place::File(path) => {
                put(b"file");
                put(b"");
                put(path.as_os_str().as_bytes());
            }
        }
        bytes.extend((self.lost.len() as u32).to_be_bytes());
        for name in &self.lost {
            bytes.extend((name.len() as u32).to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes.extend(self.images.encode());
        bytes
    }

    /// Reads it. `None`: it is damaged, or somebody else's.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        fn number(rest: &mut &[u8]) -> Option<usize> {
            let (number, after) = rest.split_first_chunk::<4>()?;
            *rest = after;
            Some(u32::from_be_bytes(*number) as usize)
        }
        fn part(rest: &mut &[u8]) -> Option<Vec<u8>> {
            let length = number(rest)?;
            let (part, after) = rest.split_at_checked(length)?;
            *rest = after;
            Some(part.to_vec())
        }
        let rest = &mut &*bytes;
        let kind = part(rest)?;
        let name = String::from_utf8(part(rest)?).ok()?;
        let owner = match &kind[..] {
            b"drive" => Owner::Drive(name),
            b"node" => Owner::Node(name),
            _ => return None,
        };
        let kind = part(rest)?;
        let node = String::from_utf8(part(rest)?).ok()?;
        let path = PathBuf::from(OsString::from_vec(part(rest)?));
        let place = match &kind[..] {
            b"qcow2" => Place::Image { node, file: path },
            b"file" => Place::File(path),
            _ => return None,
        };
        let count = number(rest)?;
        let lost = (0..count).map(|_| String::from_utf8(part(rest)?).ok()).collect::<Option<_>>()?;
        let images = Fingerprint::decode(rest)?;
        Some(Self { owner, place, lost, images })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_says_of_itself_is_read_again_and_damage_is_noticed() {
        let places = [
            Place::File("/a/vda.dlbitmaps".into()),
            Place::Image { node: "active".into(), file: "/a/active.qcow2".into() },
        ];
        for place in places {
            for owner in [Owner::Drive("vda".into()), Owner::Node("active".into())] {
                let owned = Owned {
                    owner: owner.clone(),
                    place: place.clone(),
                    lost: vec!["old".to_owned(), String::new()],
                    images: Fingerprint::default(),
                };
                let bytes = owned.encode();
                let again = Owned::decode(&bytes).unwrap();
                assert_eq!((again.owner, again.place, again.lost), (owner, place.clone(), owned.lost));
                for length in 0..bytes.len() {
                    assert!(Owned::decode(&bytes[..length]).is_none());
                }
            }
        }
        assert!(Owned::decode(b"\0\0\0\x05drove").is_none());
    }
}
