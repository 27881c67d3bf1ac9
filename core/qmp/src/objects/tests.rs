use super::{secret::decode_base64, *};
use proptest::prelude::*;
use serde_json::json;

fn add(objects: &Objects, arguments: Value) -> Result<()> {
    objects.add(arguments.as_object().unwrap().clone())
}

#[test]
fn threads_are_taken_in_turn_and_kept_while_they_are_used() {
    let objects = Objects::new(2);
    for (id, expected) in [("a", 0), ("b", 1), ("c", 0)] {
        add(&objects, json!({ "qom-type": "iothread", "id": id })).unwrap();
        assert_eq!(objects.iothread(id).unwrap().0.thread, expected);
    }
    let (_, held) = objects.iothread("a").unwrap();
    assert_eq!(objects.remove("a").unwrap_err().desc, "object 'a' is in use, can not be deleted");
    drop(held);
    objects.remove("a").unwrap();
    assert_eq!(objects.iothread("a").unwrap_err().desc, "iothread \"a\" not found");
}

#[test]
fn listeners_hear_what_changes_and_nothing_of_what_is_refused() {
    let objects = Objects::default();
    let heard: Arc<Mutex<Vec<String>>> = Arc::default();
    let to = heard.clone();
    objects.on_change(move |id, change| {
        let what = match change {
            ObjectChange::Added(_) => "added".to_owned(),
            ObjectChange::Changed(Object::ThrottleGroup(limits)) => {
                format!("{} {}", limits.iops_total.average, limits.bps_total.average)
            }
            ObjectChange::Changed(_) => "changed".to_owned(),
            ObjectChange::Removed => "removed".to_owned(),
        };
        to.lock().push(format!("{id} {what}"));
    });
    add(&objects, json!({ "qom-type": "throttle-group", "id": "g", "limits": { "iops-total": 9 } })).unwrap();
    objects.set("g", "limits", json!({ "bps-total": 5 })).unwrap();
    objects.set("g", "limits", json!({ "bps-read": 5 })).unwrap_err();
    objects.set("g", "x-bps-total", json!(6)).unwrap_err();
    objects.remove("g").unwrap();
    assert_eq!(*heard.lock(), ["g added", "g 9 5", "g removed"]);
}

#[test]
fn a_secret_is_read_once_and_not_shown_by_debug() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    fs::write(&file, "c2VjcmV0\n").unwrap();
    let objects = Objects::default();
    let of = json!({ "qom-type": "secret", "id": "s", "file": file, "format": "base64" });
    add(&objects, of).unwrap();
    fs::remove_file(&file).unwrap();
    assert_eq!(objects.secret("s").unwrap(), b"secret");
    assert!(!format!("{:?}", objects.get("s")).contains("115"));
    let with_key = json!({ "qom-type": "secret", "id": "t", "data": "x", "keyid": "s", "iv": "" });
    assert!(add(&objects, with_key).unwrap_err().desc.contains("'keyid'"));
}

#[test]
fn credentials_say_which_file_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let objects = Objects::default();
    let creds =
        json!({ "qom-type": "tls-creds-x509", "id": "c", "dir": folder.path(), "endpoint": "server" });
    for name in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
        let path = folder.path().join(name);
        let expected = format!("Unable to access credentials {}: No such file or directory", path.display());
        assert_eq!(add(&objects, creds.clone()).unwrap_err().desc, expected);
        fs::write(path, "").unwrap();
    }
    add(&objects, creds).unwrap();
    assert!(objects.tls_creds("c", Endpoint::Server).unwrap().0.verify_peer);
    let wrong = objects.tls_creds("c", Endpoint::Client).unwrap_err().desc;
    assert_eq!(wrong, "Expected TLS credentials for a client endpoint");
}

proptest! {
    #[test]
    fn base64_is_read_as_it_was_written(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = Vec::new();
        for group in bytes.chunks(3) {
            let mut word = [0; 4];
            word[1..=group.len()].copy_from_slice(group);
            let bits = u32::from_be_bytes(word);
            for at in 0..4 {
                let digit = DIGITS[(bits >> (18 - 6 * at)) as usize % 64];
                text.push(if at > group.len() { b'=' } else { digit });
            }
        }
        prop_assert_eq!(decode_base64(&text), Some(bytes));
        text.push(b'A');
        prop_assert_eq!(decode_base64(&text), None);
    }
}
