//! The command line taken apart: options in their order, each with its text for messages.

/// An option of QEMU's storage daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Blockdev,
    Chardev,
    Daemonize,
    Export,
    Help,
    Monitor,
    NbdServer,
    Object,
    Pidfile,
    Trace,
    Version,
}

/// By name; and whether it takes an argument.
const OPTIONS: [(&str, Kind, bool); 11] = [
    ("blockdev", Kind::Blockdev, true),
    ("chardev", Kind::Chardev, true),
    ("daemonize", Kind::Daemonize, false),
    ("export", Kind::Export, true),
    ("help", Kind::Help, false),
    ("monitor", Kind::Monitor, true),
    ("nbd-server", Kind::NbdServer, true),
    ("object", Kind::Object, true),
    ("pidfile", Kind::Pidfile, true),
    ("trace", Kind::Trace, true),
    ("version", Kind::Version, false),
];

/// An option that was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) kind: Kind,
    /// Its argument; empty if it takes none.
    pub(super) value: String,
    /// As it was written, for messages.
    pub(super) text: String,
}

/// Reads the arguments after the program's name. Long options may be shortened, as getopt allows.
///
/// Returns what was read before the first mistake (an option that is not known, or has an argument too few or too many), and
/// that mistake in getopt's words.
pub(super) fn parse(arguments: impl IntoIterator<Item = String>) -> (Vec<Given>, Option<String>) {
    let mut given = Vec::new();
    let wrong = read(&mut arguments.into_iter(), &mut given).err();
    (given, wrong)
}

fn read(arguments: &mut impl Iterator<Item = String>, given: &mut Vec<Given>) -> Result<(), String> {
    let mut only_words = false;
    while let Some(argument) = arguments.next() {
        if only_words || argument == "-" || !argument.starts_with('-') {
            return Err(format!("{argument}: Unexpected argument"));
        }
        if argument == "--" {
            only_words = true;
        } else if let Some(long) = argument.strip_prefix("--") {
            given.push(long_option(long, &argument, arguments)?);
        } else {
            short_options(&argument, arguments, given)?;
        }
    }
    Ok(())
}

fn long_option(long: &str, argument: &str, rest: &mut impl Iterator<Item = String>) -> Result<Given, String> {
    let (name, value) = match long.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (long, None),
    };
    // Their first letters differ, so that no part of one is part of another.
    let found = OPTIONS.iter().find(|(full, ..)| !name.is_empty() && full.starts_with(name));
    let Some((name, kind, takes_value)) = found.copied() else {
        return Err(format!("unrecognized option '{argument}'"));
    };
    let text = argument.to_owned();
    match (takes_value, value) {
        (false, Some(_)) => Err(format!("option '--{name}' doesn't allow an argument")),
        (false, None) => Ok(Given { kind, value: String::new(), text }),
        (true, Some(value)) => Ok(Given { kind, value, text }),
        (true, None) => match rest.next() {
            Some(value) => Ok(Given { kind, text: format!("{text} {value}"), value }),
            None => Err(format!("option '--{name}' requires an argument")),
        },
    }
}

fn short_options(
    argument: &str,
    rest: &mut impl Iterator<Item = String>,
    given: &mut Vec<Given>,
) -> Result<(), String> {
    for (at, letter) in argument[1..].char_indices() {
        let (kind, value, text) = match letter {
            'h' => (Kind::Help, String::new(), "-h".to_owned()),
            'V' => (Kind::Version, String::new(), "-V".to_owned()),
            'T' => match &argument[at + 2..] {
                "" => match rest.next() {
                    Some(value) => (Kind::Trace, value.clone(), format!("{argument} {value}")),
                    None => return Err("option requires an argument -- 'T'".to_owned()),
                },
                value => (Kind::Trace, value.to_owned(), argument.to_owned()),
            },
            other => return Err(format!("invalid option -- '{other}'")),
        };
        given.push(Given { kind, value, text });
        if kind == Kind::Trace {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(Kind, String, String)>, String> {
        let (given, wrong) = parse(text.split_whitespace().map(str::to_owned));
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        Ok(given.into_iter().map(|given| (given.kind, given.value, given.text)).collect())
    }

    #[test]
    fn options_are_read_as_getopt_does() {
        let read = read("--blockdev a --blockdev=b=c --mon m -hVT x -Ty --daemonize").unwrap();
        let expected = [
            (Kind::Blockdev, "a", "--blockdev a"),
            (Kind::Blockdev, "b=c", "--blockdev=b=c"),
            (Kind::Monitor, "m", "--mon m"),
            (Kind::Help, "", "-h"),
            (Kind::Version, "", "-V"),
            (Kind::Trace, "x", "-hVT x"),
            (Kind::Trace, "y", "-Ty"),
            (Kind::Daemonize, "", "--daemonize"),
        ];
        assert_eq!(read, expected.map(|(kind, value, text)| (kind, value.to_owned(), text.to_owned())));
    }

    #[test]
    fn what_is_no_option_is_said_in_getopts_words() {
        for (text, expected) in [
            ("--bogus", "unrecognized option '--bogus'"),
            ("--=x", "unrecognized option '--=x'"),
            ("--nbd", "option '--nbd-server' requires an argument"),
            ("--daemonize=3", "option '--daemonize' doesn't allow an argument"),
            ("-x", "invalid option -- 'x'"),
            ("-T", "option requires an argument -- 'T'"),
            ("foo", "foo: Unexpected argument"),
            ("-- --help", "--help: Unexpected argument"),
        ] {
            assert_eq!(read(text).unwrap_err(), expected, "{text}");
        }
    }
}
