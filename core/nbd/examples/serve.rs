//! Serves one node until it is interrupted: `serve DEFINITION ADDRESS [BITMAP]`.
//!
//! ```sh
//! cargo run --release -p driveline-nbd --example serve -- '{"driver": "memory", "size": "1GiB"}' /tmp/disk.sock daily
//! nbdinfo 'nbd+unix:///?socket=/tmp/disk.sock'
//! ```

use std::sync::Arc;

use driveline_drivers::{FileDriver, MemoryDriver, NullDriver, RawDriver};
use driveline_engine::signal::Signals;
use driveline_engine::{Config, Engine};
use driveline_graph::{Graph, GraphOptions, NewBitmap, Options, RootOptions};
use driveline_nbd::{Address, Export, Server, ServerOptions};

type Error = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [definition, address, bitmaps @ ..] = &arguments[..] else {
        return Err("usage: serve DEFINITION ADDRESS [BITMAP]...".into());
    };
    let mut definition: Options = serde_json::from_str(definition)?;
    definition.insert("node-name".into(), "storage".into());
    let address = match address.parse() {
        Ok(address) => Address::Tcp(address),
        Err(_) => Address::Unix(address.into()),
    };
    let engine = Engine::start(Config::default())?;
    let server = Server::new(engine.handle(), ServerOptions::default());
    engine.block_on(async {
        let graph = Graph::new(GraphOptions::default());
        graph.register(Arc::new(FileDriver::default()))?;
        graph.register(Arc::new(MemoryDriver::default()))?;
        graph.register(Arc::new(NullDriver::default()))?;
        graph.register(Arc::new(RawDriver::default()))?;
        let mut change = graph.change().await;
        change.add_node(graph.parse(definition, &[])?).await?;
        change.set_drive("disk", "storage")?;
        for name in bitmaps {
            change.add_bitmap("disk", NewBitmap::named(name))?;
        }
        change.commit().await?;
        let root = graph.open_root("disk", RootOptions::writer("export 'disk'")).await?;
        let export = Export::new(root.clone()).writable(true);
        let export = graph.bitmaps("disk")?.into_iter().fold(export, Export::bitmap);
        server.add_export("disk", export)?;
        println!("serving {}", server.listen(&address)?);
        Signals::terminate()?.next().await?;
        server.close().await;
        root.close().await?;
        graph.close().await?;
        Ok(())
    })
}
