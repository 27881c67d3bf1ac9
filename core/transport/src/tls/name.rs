//! Whose a certificate is, in one line: `C=GB,O=Home,CN=laptop`.
//!
//! Access lists are written by this line, so it is spelled as QEMU spells it, which is the way of GnuTLS
//! (`gnutls_x509_crt_get_dn`): in the order of the certificate, `,` between its parts and `+` within one, `\` before what would
//! be mistaken. What is no text that GnuTLS would show is `#` and its bytes in hexadecimal. So is text that is no UTF-8, which GnuTLS
//! passes on as it is: no list could name it.

use std::fmt::Write;

/// What the values of an attribute have to be, to be shown as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    /// UTF-8, or what is older.
    Directory,
    Printable,
    Ia5,
    Numeric,
}

/// Tags of DER.
mod tag {
    pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
    pub(super) const UTF8_STRING: u8 = 0x0c;
    pub(super) const NUMERIC_STRING: u8 = 0x12;
    pub(super) const PRINTABLE_STRING: u8 = 0x13;
    pub(super) const TELETEX_STRING: u8 = 0x14;
    pub(super) const IA5_STRING: u8 = 0x16;
    pub(super) const UNIVERSAL_STRING: u8 = 0x1c;
    pub(super) const BMP_STRING: u8 = 0x1e;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const SET: u8 = 0x31;
}

/// GnuTLS' names of attributes.
const NAMES: &[(&str, &str, Text)] = &[
    ("2.5.4.3", "CN", Text::Directory),
    ("2.5.4.4", "surName", Text::Directory),
    ("2.5.4.5", "serialNumber", Text::Printable),
    ("2.5.4.6", "C", Text::Printable),
    ("2.5.4.7", "L", Text::Directory),
    ("2.5.4.8", "ST", Text::Directory),
    ("2.5.4.9", "street", Text::Directory),
    ("2.5.4.10", "O", Text::Directory),
    ("2.5.4.11", "OU", Text::Directory),
    ("2.5.4.12", "title", Text::Directory),
    ("2.5.4.13", "description", Text::Directory),
    ("2.5.4.15", "businessCategory", Text::Directory),
    ("2.5.4.17", "postalCode", Text::Directory),
    ("2.5.4.20", "telephoneNumber", Text::Printable),
    ("2.5.4.41", "name", Text::Directory),
    ("2.5.4.42", "givenName", Text::Directory),
    ("2.5.4.43", "initials", Text::Directory),
    ("2.5.4.44", "generationQualifier", Text::Directory),
    ("2.5.4.46", "dnQualifier", Text::Printable),
    ("2.5.4.65", "pseudonym", Text::Directory),
    ("1.2.840.113549.1.9.1", "EMAIL", Text::Ia5),
    ("0.9.2342.19200300.100.1.1", "UID", Text::Directory),
    ("0.9.2342.19200300.100.1.25", "DC", Text::Ia5),
    ("1.3.6.1.5.5.7.9.2", "placeOfBirth", Text::Directory),
    ("1.3.6.1.5.5.7.9.3", "gender", Text::Printable),
    ("1.3.6.1.5.5.7.9.4", "countryOfCitizenship", Text::Printable),
    ("1.3.6.1.5.5.7.9.5", "countryOfResidence", Text::Printable),
    ("1.3.6.1.4.1.311.60.2.1.1", "jurisdictionOfIncorporationLocalityName", Text::Directory),
    ("1.3.6.1.4.1.311.60.2.1.2", "jurisdictionOfIncorporationStateOrProvinceName", Text::Directory),
    ("1.3.6.1.4.1.311.60.2.1.3", "jurisdictionOfIncorporationCountryName", Text::Printable),
    ("1.2.643.3.131.1.1", "INN", Text::Numeric),
    ("1.2.643.100.1", "OGRN", Text::Numeric),
    ("1.2.643.100.3", "SNILS", Text::Numeric),
    ("1.2.643.100.5", "OGRNIP", Text::Numeric),
];

/// The subject of a certificate, from the DER of its parts. `None`: it is no name.
pub(super) fn spelled(subject: &[u8]) -> Option<String> {
    let mut out = String::new();
    let mut parts = Reader(subject);
    while !parts.0.is_empty() {
        if !out.is_empty() {
            out.push(',');
        }
        let mut attributes = Reader(parts.value(tag::SET)?);
        let mut first = true;
        while !attributes.0.is_empty() {
            if !std::mem::take(&mut first) {
                out.push('+');
            }
            let mut attribute = Reader(attributes.value(tag::SEQUENCE)?);
            let key = dotted(attribute.value(tag::OBJECT_IDENTIFIER)?)?;
            let whole = attribute.0;
            let (kind, value) = attribute.element()?;
            if !attribute.0.is_empty() {
                return None;
            }
            let known = NAMES.iter().find(|(id, ..)| *id == key);
            out.push_str(known.map_or(&*key, |(_, name, _)| *name));
            out.push('=');
            match known.and_then(|(_, _, text)| shown(*text, kind, value)) {
                Some(text) => escape(&text, &mut out),
                None => {
                    out.push('#');
                    hexadecimal(whole, &mut out);
                }
            }
        }
    }
    Some(out)
}

/// A value as text, before it is escaped. `None`: it is not shown as one.
fn shown(text: Text, kind: u8, value: &[u8]) -> Option<String> {
    let utf8 = || {
        let text = std::str::from_utf8(value).ok()?;
        (!text.contains('\0')).then(|| text.to_owned())
    };
    match (text, kind) {
        (Text::Directory, tag::UTF8_STRING | tag::PRINTABLE_STRING)
        | (Text::Printable, tag::PRINTABLE_STRING)
        | (Text::Ia5, tag::IA5_STRING)
        | (Text::Numeric, tag::NUMERIC_STRING) => utf8(),
        (Text::Directory, tag::BMP_STRING) => {
            let (units, rest) = value.as_chunks::<2>();
            let units: Vec<u16> = units.iter().map(|unit| u16::from_be_bytes(*unit)).collect();
            let text = String::from_utf16(&units).ok()?;
            (rest.is_empty() && !text.contains('\0')).then_some(text)
        }
        (Text::Directory, tag::TELETEX_STRING)
            if value.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ') =>
        {
            utf8()
        }
        // Bytes in a code that it does not read are a text in hexadecimal.
        (Text::Directory, tag::TELETEX_STRING | tag::UNIVERSAL_STRING) => {
            let mut text = "#".to_owned();
            hexadecimal(value, &mut text);
            Some(text)
        }
        _ => None,
    }
}

/// As RFC 4514 has it.
fn escape(text: &str, out: &mut String) {
    let last = text.chars().count().wrapping_sub(1);
    for (at, c) in text.chars().enumerate() {
        let edge = at == 0 && matches!(c, ' ' | '#') || at == last && c == ' ';
        if edge || matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            out.push('\\');
        }
        out.push(c);
    }
}

fn hexadecimal(bytes: &[u8], out: &mut String) {
    for byte in bytes {
        let _ = write!(out, "{byte:02x}");
    }
}

/// An object identifier with its dots.
fn dotted(bytes: &[u8]) -> Option<String> {
    if bytes.last().is_none_or(|last| last & 0x80 != 0) {
        return None;
    }
    let mut out = String::new();
    let mut number = 0_u64;
    for byte in bytes {
        if number > u64::MAX >> 7 {
            return None;
        }
        number = number << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            if out.is_empty() {
                // The first two are in one.
                let root = (number / 40).min(2);
                let _ = write!(out, "{root}.{}", number - root * 40);
            } else {
                let _ = write!(out, ".{number}");
            }
            number = 0;
        }
    }
    Some(out)
}

/// DER, from its beginning.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The next element's content, if it is of this kind.
    fn value(&mut self, kind: u8) -> Option<&'a [u8]> {
        self.element().filter(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    fn element(&mut self) -> Option<(u8, &'a [u8])> {
        let (&kind, rest) = self.0.split_first()?;
        let (&first, mut rest) = rest.split_first()?;
        let length = match first {
            0..=0x7f => usize::from(first),
            0x81..=0x84 => {
                let (bytes, after) = rest.split_at_checked(usize::from(first & 0x7f))?;
                rest = after;
                bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte))
            }
            _ => return None,
        };
        let (value, after) = rest.split_at_checked(length)?;
        self.0 = after;
        Some((kind, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An element of less than 128 bytes.
    fn element(kind: u8, value: &[u8]) -> Vec<u8> {
        [&[kind, u8::try_from(value.len()).unwrap()], value].concat()
    }

    fn attribute(id: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
        let id = element(tag::OBJECT_IDENTIFIER, id);
        element(tag::SEQUENCE, &[id, element(kind, value)].concat())
    }

    fn one(id: &[u8], kind: u8, value: &[u8]) -> String {
        spelled(&element(tag::SET, &attribute(id, kind, value))).unwrap()
    }

    const CN: &[u8] = &[0x55, 4, 3];
    const COUNTRY: &[u8] = &[0x55, 4, 6];

    /// What GnuTLS 3.8 makes of the same bytes.
    #[test]
    fn names_are_spelled_as_gnutls_spells_them() {
        let cn = |value: &[u8]| one(CN, tag::UTF8_STRING, value);
        assert_eq!(cn("a#é日本".as_bytes()), "CN=a#é日本");
        assert_eq!(cn(b"  a  b  "), r"CN=\  a  b \ ");
        assert_eq!(cn(b" "), r"CN=\ ");
        assert_eq!(cn(b"##"), r"CN=\##");
        assert_eq!(cn(br#"A "q" \ <x>;,+="#), r#"CN=A \"q\" \\ \<x\>\;\,\+="#);
        assert_eq!(cn(b"a\0c"), "CN=#0c03610063");
        assert_eq!(cn(b""), "CN=");
        assert_eq!(one(CN, tag::TELETEX_STRING, b"ab"), "CN=ab");
        assert_eq!(one(CN, tag::TELETEX_STRING, b"a\xe9"), r"CN=\#61e9");
        assert_eq!(one(CN, tag::UNIVERSAL_STRING, b"ab"), r"CN=\#6162");
        assert_eq!(one(CN, tag::BMP_STRING, b"\0a\0\xe9"), "CN=aé");
        assert_eq!(one(CN, tag::IA5_STRING, b"99"), "CN=#16023939");
        assert_eq!(one(COUNTRY, tag::PRINTABLE_STRING, b"GB"), "C=GB");
        assert_eq!(one(COUNTRY, tag::UTF8_STRING, b"99"), "C=#0c023939");
        let email = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1];
        assert_eq!(one(&email, tag::IA5_STRING, b"a@b"), "EMAIL=a@b");
        assert_eq!(one(&[0x2a, 3, 4, 5], tag::PRINTABLE_STRING, b"99"), "1.2.3.4.5=#13023939");
    }

    #[test]
    fn parts_stay_in_their_order() {
        let part = |attributes: &[Vec<u8>]| element(tag::SET, &attributes.concat());
        let name = [
            part(&[attribute(COUNTRY, tag::PRINTABLE_STRING, b"GB")]),
            part(&[attribute(CN, tag::UTF8_STRING, b"a"), attribute(&[0x55, 4, 11], tag::UTF8_STRING, b"b")]),
        ];
        assert_eq!(spelled(&name.concat()).unwrap(), "C=GB,CN=a+OU=b");
        assert_eq!(spelled(&[]).unwrap(), "");
    }

    /// Text that would be more than one part never looks like it, and bytes that are no name are none.
    #[test]
    fn what_is_cut_short_is_no_name() {
        let whole = element(tag::SET, &attribute(CN, tag::UTF8_STRING, b"a,CN=b"));
        assert_eq!(spelled(&whole).unwrap(), r"CN=a\,CN=b");
        for end in 1..whole.len() {
            assert_eq!(spelled(&whole[..end]), None, "{end}");
        }
        assert_eq!(spelled(&[tag::SET, 0x85, 0, 0, 0, 0, 0]), None);
        assert_eq!(spelled(&element(tag::SEQUENCE, b"")), None);
    }
}
