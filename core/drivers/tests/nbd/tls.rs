//! TLS: our client with the servers of others, our server with the clients of others, and both with each other.

#[path = "../../../transport/tests/kit/mod.rs"]
mod certificates;

use crate::kit::{Folder, Server, ask, engine, errno, have, open_with, text, write};
use certificates::{Creds, Time};
use driveline_drivers::{
    MemoryDriver, NbdDriver,
    conformance::{Check, check},
};
use driveline_engine::Engine;
use driveline_graph::{Graph, GraphOptions, RootOptions};
use driveline_nbd::{Address, Endpoint, Export, ServerOptions, TlsCreds, TlsRegistry};
use driveline_op::op;
use driveline_wire::*;
use serde_json::{Value, json};
use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
};

const MIB: u64 = 1 << 20;

/// A driver that knows the client's credentials of a directory as `tls0`.
fn driver(creds: &Creds) -> NbdDriver {
    let registry = TlsRegistry::default();
    registry.add("tls0", &TlsCreds::new(creds.dir(), Endpoint::Client)).unwrap();
    NbdDriver::new(registry)
}

fn tls_options(folder: &Folder, more: Value) -> Value {
    let mut options = folder.options(json!({ "tls-creds": "tls0", "tls-hostname": "localhost" }));
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    options
}

/// A disk of ours behind TLS, at the folder's socket and at a port.
async fn serve(
    engine: &Engine,
    folder: &Folder,
    creds: TlsCreds,
) -> (driveline_nbd::Server, Graph, SocketAddr) {
    let graph = Graph::new(GraphOptions::default());
    graph.register(std::sync::Arc::new(MemoryDriver::default())).unwrap();
    let disk = json!({ "driver": "memory", "size": "4MiB", "node-name": "disk" });
    let mut change = graph.change().await;
    change.add_node(graph.parse(disk.as_object().unwrap().clone(), &[]).unwrap()).await.unwrap();
    change.commit().await.unwrap();
    let root = graph.open_root("disk", RootOptions::writer("export")).await.unwrap();
    let options = ServerOptions { tls: Some(creds.server().unwrap()), ..ServerOptions::default() };
    let server = driveline_nbd::Server::new(engine.handle(), options);
    server.add_export("disk", Export::new(root).writable(true)).unwrap();
    server.listen(&Address::Unix(folder.socket())).unwrap();
    let Address::Tcp(port) = server.listen(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap() else {
        unreachable!("it was TCP")
    };
    (server, graph, port)
}

fn conforms(engine: &Engine, creds: &Creds, options: Value) {
    let driver = driver(creds);
    engine.block_on_local(|| async move {
        let node = open_with(&driver, options).await.unwrap();
        assert_eq!(node.node.details()["tls"], true);
        check(&node.edge, Check { seed: 3, steps: 40, size_bytes_max: MIB, ..Check::default() }).await;
        // More than a record, and more than the socket holds.
        let data = vec![9; 3 << 20];
        assert_eq!(errno(&write(&node, 0, &data[..2 << 20], 0).await), 0);
        let answer = ask(&node, op::READ, 0, 2 << 20, 0).await;
        assert!(answer.result.is_ok() && answer.buffer[..] == data[..2 << 20]);
        node.node.close(&[]).await.unwrap();
    });
}

#[test]
fn our_client_conforms_with_every_server() {
    let (engine, creds) = (engine(), Creds::whole());
    let folder = Folder::new();
    let (server, graph, _) =
        engine.block_on(serve(&engine, &folder, TlsCreds::new(creds.dir(), Endpoint::Server)));
    conforms(&engine, &creds, tls_options(&folder, json!({ "export": "disk" })));
    engine.block_on(async {
        server.close().await;
        graph.close().await.unwrap();
    });
    if !have("qemu-nbd") || !have("nbdkit") {
        return;
    }
    let folder = Folder::new();
    let image = folder.path("disk");
    fs::File::create(&image).unwrap().set_len(4 * MIB).unwrap();
    let object = format!("tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}", text(creds.dir()));
    let arguments = ["-f", "raw", "--object", &object, "--tls-creds", "tls0", text(&image)];
    let _qemu = Server::qemu_nbd(&folder.socket(), &arguments);
    conforms(&engine, &creds, tls_options(&folder, json!({})));
    let folder = Folder::new();
    let certificates = format!("--tls-certificates={}", text(creds.dir()));
    let arguments = ["--tls=require", &certificates, "--tls-verify-peer", "memory", "4M"];
    let _nbdkit = Server::nbdkit(&folder.socket(), &arguments);
    conforms(&engine, &creds, tls_options(&folder, json!({})));
}

/// Runs a tool with the certificates of a directory; whether it was well, and all that it said.
fn run(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

fn qemu_img(creds: &Path, port: SocketAddr, more: &[&str]) -> (bool, String) {
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", text(creds));
    let image = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.ipv4=on,server.port={},export=disk,tls-creds=tls0",
        port.port()
    );
    let mut arguments = vec!["info", "--object", &object, "--image-opts", &image];
    arguments.extend(more);
    run("qemu-img", &arguments)
}

#[test]
fn the_clients_of_others_use_our_server() {
    if !have("qemu-img") || !have("nbdinfo") || !have("nbdcopy") {
        return;
    }
    let (engine, folder, creds) = (engine(), Folder::new(), Creds::whole());
    let (server, graph, port) =
        engine.block_on(serve(&engine, &folder, TlsCreds::new(creds.dir(), Endpoint::Server)));
    let (well, said) = qemu_img(creds.dir(), port, &[]);
    assert!(well && said.contains("4 MiB (4194304 bytes)"), "{said}");
    let uri = format!(
        "nbds://localhost:{}/disk?tls-certificates={}&tls-hostname=localhost",
        port.port(),
        text(creds.dir())
    );
    let (well, said) = run("nbdinfo", &["--size", &uri]);
    assert!(well && said.trim() == "4194304", "{said}");
    let (source, copy) = (folder.path("source"), folder.path("copy"));
    let data: Vec<u8> = (0..4 * MIB as u32).map(|i| (i * 7 + i / 999) as u8).collect();
    fs::write(&source, &data).unwrap();
    for arguments in [["--requests=64", text(&source), &uri], ["--requests=64", &uri, text(&copy)]] {
        let (well, said) = run("nbdcopy", &arguments);
        assert!(well, "{said}");
    }
    assert!(fs::read(&copy).unwrap() == data);
    // Whoever comes without, or with the wrong papers, is told so.
    let plain = format!("nbd://localhost:{}/disk", port.port());
    let (well, said) = run("qemu-img", &["info", &plain]);
    assert!(!well && said.contains("not permitted before TLS"), "{said}");
    let strangers = Creds::whole();
    let (well, said) = qemu_img(strangers.dir(), port, &[]);
    assert!(!well && (said.contains("certificate") || said.contains("TLS handshake failed")), "{said}");
    creds.remove("client-cert.pem");
    creds.remove("client-key.pem");
    let (well, said) = qemu_img(creds.dir(), port, &[]);
    assert!(!well, "no certificate, no entry: {said}");
    engine.block_on(async {
        server.close().await;
        graph.close().await.unwrap();
    });
}

#[test]
fn our_client_says_why_it_does_not_trust_or_is_not_trusted() {
    let (engine, folder, creds) = (engine(), Folder::new(), Creds::whole());
    let (server, graph, _) =
        engine.block_on(serve(&engine, &folder, TlsCreds::new(creds.dir(), Endpoint::Server)));
    let says = |driver: NbdDriver, mut options: Value| {
        options["export"] = "disk".into();
        options["open-timeout"] = 0.into();
        let opened = engine.block_on_local(|| async move { open_with(&driver, options).await.map(drop) });
        opened.unwrap_err().to_string()
    };
    let plain = folder.options(json!({}));
    let text = says(NbdDriver::default(), plain.clone());
    assert!(text.contains("Server requires TLS for option") && text.contains("tls-creds"), "{text}");
    let tls = tls_options(&folder, json!({}));
    let text = says(driver(&Creds::whole()), tls.clone());
    assert!(text.contains("The certificate hasn't got a known issuer"), "{text}");
    let text = says(driver(&creds), tls_options(&folder, json!({ "tls-hostname": "example.org" })));
    assert!(text.contains("Certificate does not match the hostname example.org"), "{text}");
    let mut unnamed = plain;
    unnamed["tls-creds"] = "tls0".into();
    assert!(says(driver(&creds), unnamed).contains("No hostname for certificate validation"));
    creds.remove("client-cert.pem");
    creds.remove("client-key.pem");
    let text = says(driver(&creds), tls.clone());
    assert!(text.contains("certificate") || text.contains("Certificate"), "{text}");
    creds.add("server", "server", &["localhost"], Time::Past);
    assert!(TlsCreds::new(creds.dir(), Endpoint::Server).server().is_err());
    engine.block_on(async {
        server.close().await;
        graph.close().await.unwrap();
    });
}

/// A client that does what no library does.
struct Raw(UnixStream);

impl Raw {
    fn connect(folder: &Folder) -> Raw {
        let mut raw = Raw(UnixStream::connect(folder.socket()).unwrap());
        raw.take(Greeting::LENGTH);
        let mut out = Vec::new();
        ClientFlags::KNOWN.encode(&mut out);
        raw.0.write_all(&out).unwrap();
        raw
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn ask(&mut self, request: &OptionRequest<'_>) -> ReplyCode {
        let mut out = Vec::new();
        request.encode(&mut out);
        self.0.write_all(&out).unwrap();
        let header = OptionReplyHeader::decode(&self.take(OptionReplyHeader::LENGTH)).unwrap();
        self.take(header.length as usize);
        header.code
    }

    /// Whether the server ends the connection without another word (an alert of TLS is none).
    fn ended(mut self) -> bool {
        let mut rest = Vec::new();
        let _ = self.0.read_to_end(&mut rest);
        !rest.windows(8).any(|bytes| bytes == OPTION_REPLY_MAGIC.to_be_bytes())
    }
}

#[test]
fn nothing_is_told_before_tls() {
    let (engine, folder, creds) = (engine(), Folder::new(), Creds::whole());
    let (server, graph, _) =
        engine.block_on(serve(&engine, &folder, TlsCreds::new(creds.dir(), Endpoint::Server)));
    let go = || InfoRequest { export: "disk", infos: vec![] };
    let mut raw = Raw::connect(&folder);
    for request in [
        OptionRequest::List,
        OptionRequest::Go(go()),
        OptionRequest::Info(go()),
        OptionRequest::StructuredReply,
        OptionRequest::ExtendedHeaders,
        OptionRequest::SetMetaContext(MetaContextRequest { export: "disk", queries: vec![] }),
        OptionRequest::Unknown(OptionCode(4711)),
    ] {
        assert_eq!(raw.ask(&request), ReplyCode::ERR_TLS_REQD, "{request:?}");
    }
    assert_eq!(raw.ask(&OptionRequest::StartTls), ReplyCode::ACK);
    // No handshake of TLS, but the next option in the clear.
    let mut out = Vec::new();
    OptionRequest::List.encode(&mut out);
    raw.0.write_all(&out).unwrap();
    assert!(raw.ended());
    let mut raw = Raw::connect(&folder);
    assert_eq!(raw.ask(&OptionRequest::Abort), ReplyCode::ACK);
    // The option that cannot be refused.
    let mut raw = Raw::connect(&folder);
    let mut out = Vec::new();
    OptionRequest::ExportName("disk").encode(&mut out);
    raw.0.write_all(&out).unwrap();
    assert_eq!(raw.0.read_to_end(&mut Vec::new()).unwrap(), 0);
    // What is sent along with the wish is not taken for something that came in private.
    let mut raw = Raw::connect(&folder);
    let mut out = Vec::new();
    OptionRequest::StartTls.encode(&mut out);
    OptionRequest::List.encode(&mut out);
    raw.0.write_all(&out).unwrap();
    let mut rest = Vec::new();
    let _ = raw.0.read_to_end(&mut rest);
    assert!(rest.len() <= OptionReplyHeader::LENGTH, "an answer to the wish at most: {rest:?}");
    engine.block_on(async {
        server.close().await;
        graph.close().await.unwrap();
    });
}
