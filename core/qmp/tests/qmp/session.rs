//! Sessions: greeting, negotiation, ids, garbage, several at once, the end.

use crate::kit::World;
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::Duration,
};

#[test]
fn a_session_begins_with_a_greeting_and_a_negotiation() {
    let world = World::new();
    let mut client = world.connect();
    let version = &client.greeting["QMP"]["version"];
    assert_eq!(version["qemu"], json!({ "major": 10, "minor": 0, "micro": 2 }));
    assert!(version["package"].as_str().unwrap().starts_with("Driveline "), "{version}");
    assert_eq!(client.greeting["QMP"]["capabilities"], json!(["oob"]));

    let early = client.execute("query-version", json!({}));
    let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
    assert_eq!(early, json!({ "error": { "class": "CommandNotFound", "desc": text } }));
    assert!(client.wrong("qmp_capabilities", json!({ "enable": ["nope"] })).contains("'nope'"));
    client.ok("qmp_capabilities", json!({ "enable": [] }));
    let late = client.execute("qmp_capabilities", json!({}));
    assert_eq!(late["error"]["class"], "CommandNotFound");
    assert_eq!(client.ok("query-version", json!({}))["qemu"]["major"], 10);
}

#[test]
fn an_id_comes_back_whatever_it_is() {
    let world = World::new();
    let mut client = world.client();
    for id in [json!(7), json!("x"), json!(null), json!([1, { "a": null }])] {
        let good = client.raw(json!({ "execute": "query-version", "id": id }).to_string());
        assert!(good.get("return").is_some() && good["id"] == id && good.get("id").is_some(), "{good}");
        let bad = client.raw(json!({ "execute": "nope", "id": id }).to_string());
        assert_eq!(
            bad["error"],
            json!({ "class": "CommandNotFound", "desc": "The command nope has not been found" })
        );
        assert_eq!(bad["id"], id);
        let worse = client.raw(json!({ "exec": "nope", "id": id }).to_string());
        assert_eq!(worse["error"]["desc"], "QMP input member 'exec' is unexpected");
        assert_eq!(worse["id"], id);
    }
    assert!(client.raw("{'execute': 'query-version'}").get("id").is_none());
}

#[test]
fn what_is_no_command_is_said_so() {
    let world = World::new();
    let mut client = world.client();
    let wrong = [
        ("[1]", "QMP input must be a JSON object"),
        ("5 ", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ("{'execute': 5}", "QMP input member 'execute' must be a string"),
        ("{'execute': 'quit', 'arguments': []}", "QMP input member 'arguments' must be an object"),
        ("{'exec-oob': 'quit'}", "QMP input member 'exec-oob' is unexpected"),
        ("{'execute': 'quit', 'arguments': {'x': 1}}", "Parameter 'x' is unexpected"),
        ("}", "JSON parse error, expecting value"),
    ];
    for (input, expected) in wrong {
        assert_eq!(
            client.raw(input)["error"],
            json!({ "class": "GenericError", "desc": expected }),
            "{input}"
        );
    }
    assert_eq!(*world.program.quits.lock(), 0);
}

#[test]
fn commands_may_come_in_any_portions() {
    let world = World::new();
    let mut client = world.client();
    for byte in br#"{"execute": "query-version", "id": 1} {"execute": "query-version", "id": 2}"# {
        client.send([*byte]);
    }
    client.send(r#"{"execute": "query-version", "id": 3}{"execute": "query-version", "id": 4}"#);
    let ids: Vec<Value> = (0..4).map(|_| client.reply()["id"].clone()).collect();
    assert_eq!(ids, [1, 2, 3, 4]);
}

#[test]
fn replies_still_come_after_the_client_has_said_all() {
    let world = World::new();
    let mut client = world.client();
    client.send("{'execute': 'query-version', 'id': 1} {'execute': 'query-commands', 'id': 2}");
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!((client.reply()["id"].clone(), client.reply()["id"].clone()), (json!(1), json!(2)));
    assert_eq!(client.message(), None);
}

#[test]
fn every_command_that_is_listed_is_there() {
    let world = World::new();
    let mut client = world.client();
    let commands = client.ok("query-commands", json!({}));
    let names: Vec<_> = commands.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    for needed in ["qmp_capabilities", "quit", "blockdev-add", "block-stream", "transaction", "job-pause"] {
        assert!(names.contains(&needed), "{needed}");
    }
    for name in names {
        // Each takes arguments of some names only, so none does anything here.
        let reply = client.execute(name, json!({ "no-such-argument": 1 }));
        let text = reply["error"]["desc"].as_str().unwrap_or_default();
        assert!(text.contains("is missing") || text.contains("is unexpected"), "{name}: {reply}");
    }
}

#[test]
fn out_of_band_is_for_those_who_enabled_it_and_is_answered_first() {
    let world = World::new();
    let mut client = world.client();
    let unexpected = "QMP input member 'exec-oob' is unexpected";
    assert_eq!(client.raw("{'exec-oob': 'quit'}")["error"]["desc"], unexpected);
    let mut client = world.connect();
    client.ok("qmp_capabilities", json!({ "enable": ["oob"] }));
    let wrong = [
        ("{'exec-oob': 'quit', 'id': 1}", "The command quit does not support OOB"),
        ("{'exec-oob': 'nope', 'id': 1}", "The command nope has not been found"),
        ("{'exec-oob': 5, 'id': 1}", "QMP input member 'exec-oob' must be a string"),
        ("{'exec-oob': 'a', 'x': 5, 'id': 1}", "QMP input member 'x' is unexpected"),
        ("{'exec-oob': 'a', 'execute': 'a', 'id': 1}", "QMP input member 'execute' clashes with 'exec-oob'"),
    ];
    for (input, expected) in wrong {
        let reply = client.raw(input);
        assert_eq!((&reply["error"]["desc"], &reply["id"]), (&json!(expected), &json!(1)), "{input}");
    }

    client.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "disk", "size": 512 }));
    let schema = client.ok("query-qmp-schema", json!({}));
    let allows = |entry: &&Value| entry["allow-oob"] == true;
    let names: Vec<&Value> = schema.as_array().unwrap().iter().filter(allows).map(|e| &e["name"]).collect();
    assert_eq!(names, ["x-driveline-yank"]);
    // While a change of the graph is under way, a command that needs one waits; as many wait behind it as there is room for.
    let change = world.engine.block_on(world.graph.change());
    for id in 0..7 {
        let add = json!({ "driver": "null-co", "node-name": format!("n{id}"), "size": 512 });
        client.send(json!({ "execute": "blockdev-add", "arguments": add, "id": id }).to_string());
    }
    let reply = client.raw("{'exec-oob': 'query-version', 'id': 'now'}");
    assert_eq!((&reply["id"], &reply["error"]["class"]), (&json!("now"), &json!("GenericError")));
    // What waits may be waiting for a server that does not answer, and this ends that.
    let cut = "'arguments': {'node-name': 'disk'}, 'id': 'cut'";
    let reply = client.raw(format!("{{'exec-oob': 'x-driveline-yank', {cut}}}"));
    assert_eq!(reply["id"], "cut");
    assert!(reply["error"]["desc"].as_str().unwrap().contains("no connection that could be cut"), "{reply}");
    drop(change);
    let ids: Vec<Value> = (0..7).map(|_| client.reply()["id"].clone()).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6]);
}

/// A reply of more than 16 MiB took its client for one that does not read: nothing of it was sent, nothing after it, and the
/// connection stayed.
#[test]
fn a_reply_of_any_length_is_sent_and_the_next_ones_after_it() {
    let world = World::new();
    let (mut client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let monitor = world.monitor.clone();
    let session = move || async move { monitor.pretty_session(server.try_into().unwrap()).await };
    world.engine.handle().spawn_on(0, session).detach();
    // What lies deep has a line of its own in such a session, with four spaces for each level.
    const LEVELS: usize = 80;
    let id = ["[".repeat(LEVELS), vec!["1"; 1 << 16].join(","), "]".repeat(LEVELS)].concat();
    let commands =
        format!("{{'execute': 'qmp_capabilities', 'id': {id}}} {{'execute': 'query-version', 'id': 'last'}}");
    client.write_all(commands.as_bytes()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut told = Vec::new();
    client.read_to_end(&mut told).unwrap();
    assert!(told.len() > 17 << 20, "{} bytes", told.len());
    let last = String::from_utf8_lossy(&told[told.len() - 100..]);
    assert!(last.contains("\"id\": \"last\""), "{last}");
}

#[test]
fn several_monitors_hear_the_same_events_once_they_have_negotiated() {
    let world = World::new();
    let (mut one, mut two, mut silent) = (world.client(), world.client(), world.connect());
    world.monitor.emit(&driveline_qmp::Event::ExportDeleted { id: "e".into() });
    for client in [&mut one, &mut two] {
        let event = client.message().unwrap();
        assert_eq!(
            (&event["event"], &event["data"]),
            (&json!("BLOCK_EXPORT_DELETED"), &json!({ "id": "e" }))
        );
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let seconds = event["timestamp"]["seconds"].as_u64().unwrap();
        assert!(seconds.abs_diff(now) < 60, "{event}");
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000, "{event}");
    }
    silent.ok("qmp_capabilities", json!({}));
    assert!(silent.events.is_empty());
}

#[test]
fn quit_is_answered_then_told_to_all_then_done() {
    let world = World::new();
    let (mut one, mut two) = (world.client(), world.client());
    assert_eq!(one.ok("quit", json!({})), json!({}));
    let shutdown = json!({ "guest": false, "reason": "host-qmp-quit" });
    assert_eq!((one.event("SHUTDOWN"), two.event("SHUTDOWN")), (shutdown.clone(), shutdown));
    world.engine.block_on(world.monitor.close(driveline_qmp::Reason::Quit));
    // Once: the reason was told already.
    assert_eq!((one.message(), two.message()), (None, None));
    assert_eq!(*world.program.quits.lock(), 1);
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_others_go_on() {
    let world = World::new();
    let (mut deaf, mut other) = (world.client(), world.client());
    let event = driveline_qmp::Event::NodeFailed { node: "n".into(), message: "x".repeat(1 << 20) };
    const EVENTS: usize = 24;
    for _ in 0..EVENTS {
        world.monitor.emit(&event);
        other.event("X_DRIVELINE_NODE_FAILED");
    }
    assert_eq!(other.ok("query-version", json!({}))["qemu"]["major"], 10);
    let mut got = Vec::new();
    // Cut off in the middle, it may be told so by a reset.
    let _ = deaf.stream.read_to_end(&mut got);
    assert!(got.len() < EVENTS << 20, "{}", got.len());
}
