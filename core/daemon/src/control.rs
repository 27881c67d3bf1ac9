//! The program as monitors see it: exports, the NBD server, the end.

use crate::{
    config::{Address, StorePlace},
    daemon::Inner,
    exports::{Coming, Exports, NewExport},
    journal::Interrupted,
    stores::{Recovered, Trust},
};
use driveline_bitmap::Bitmap;
use driveline_engine::net::{TcpListener, UnixListener};
use driveline_graph::{BoxFuture, Change};
use driveline_nbd::{Authorize, ServerOptions};
use driveline_qmp::{
    Address as QmpAddress, Applied, ApplyWish, BitmapPlace, BitmapStore, Control, Endpoint, Error, Event,
    ExportInfo, ExportToCome, InterruptedJob, Listener, NbdExport, NbdServer, NodesGoing, Object,
    ObjectChange, Objects, RecoveredBitmap, RemoveMode, Result, TlsX509,
};
use driveline_transport::{Endpoint as TlsEnd, ServerTls, TlsCreds, TlsRegistry};
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    io,
    path::{Path, absolute},
    sync::{Arc, Weak},
    time::Duration,
};

/// Monitors do not keep the program alive: they look it up for each command.
pub(crate) struct Program(pub(crate) Weak<Inner>);

impl Program {
    fn inner(&self) -> Result<Arc<Inner>> {
        self.0.upgrade().ok_or_else(|| Error::generic("the program is ending"))
    }
}

impl Control for Program {
    fn objects(&self) -> Option<Objects> {
        self.inner().ok().map(|inner| inner.objects.clone())
    }

    fn exports(&self) -> Vec<ExportInfo> {
        let list = self.inner().map(|inner| inner.exports.list()).unwrap_or_default();
        let info = |export: crate::exports::ExportView| ExportInfo {
            id: export.id,
            node_name: export.node,
            shutting_down: export.shutting_down,
        };
        list.into_iter().map(info).collect()
    }

    fn add_export(&self, export: NbdExport) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { Ok(self.inner()?.exports.add(new_export(export)).await?) })
    }

    fn prepare_export<'a>(
        &'a self,
        change: &'a mut Change,
        export: NbdExport,
        bitmaps: Vec<Arc<Bitmap>>,
    ) -> BoxFuture<'a, Result<Box<dyn ExportToCome>>> {
        Box::pin(async move {
            let coming = Coming::prepare(self.inner()?, change, new_export(export), &bitmaps)?;
            Ok(Box::new(coming) as Box<dyn ExportToCome>)
        })
    }

    fn is_export_used(&self, id: &str) -> bool {
        self.inner().is_ok_and(|inner| inner.exports.is_used(id))
    }

    fn remove_export<'a>(&'a self, id: &'a str, mode: RemoveMode) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let inner = self.inner()?;
            Ok(inner.end_export(id, mode == RemoveMode::Safe).await?)
        })
    }

    fn start_nbd_server(&self, server: NbdServer) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let tls = server.tls.as_ref().map(server_tls).transpose()?;
            let address = match server.address {
                // Relative to where the program was started, as in QEMU.
                QmpAddress::Unix(path) => Address::Unix(absolute(&path).unwrap_or(path)),
                QmpAddress::Abstract(name) => Address::Abstract(name),
                QmpAddress::Inet(inet) => Address::Inet(inet),
                QmpAddress::Fd(name) => Address::Passed(name),
            };
            let inner = self.inner()?;
            let options = ServerOptions {
                handshake_limit: Duration::from_secs(server.handshake_max_seconds.into()),
                connections_max: server.max_connections as usize,
                tls,
                authorize: server.authz.map(|id| authorize(&inner.objects, id)),
                ..ServerOptions::default()
            };
            let exports: &Exports = &inner.exports;
            Ok(exports.start_server(address, options).await?)
        })
    }

    fn stop_nbd_server(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let inner = self.inner()?;
            for id in inner.exports.stop_server().await? {
                inner.tell(&Event::ExportDeleted { id });
            }
            Ok(())
        })
    }

    fn bitmap_store<'a>(
        &'a self,
        target: &'a str,
        place: Option<BitmapPlace>,
        flush: bool,
    ) -> BoxFuture<'a, Result<BitmapStore>> {
        Box::pin(async move {
            let stores = &self.inner()?.stores;
            if let Some(place) = place {
                let place = match place {
                    BitmapPlace::Qcow2(node) => StorePlace::Qcow2(node),
                    // Relative to where the program was started, as other paths that monitors name.
                    BitmapPlace::File(path) => StorePlace::File(absolute(&path).unwrap_or(path)),
                };
                stores.rebind(target, &place).await?;
            }
            if flush {
                stores.flush(target).await?;
            }
            let (place, file) = stores.where_kept(target)?;
            Ok(BitmapStore { place, file })
        })
    }

    fn recovered_bitmaps(&self) -> Vec<RecoveredBitmap> {
        let reports = self.inner().map(|inner| inner.stores.reports()).unwrap_or_default();
        reports.iter().map(recovered).collect()
    }

    fn interrupted_jobs(&self) -> Vec<InterruptedJob> {
        let reports = self.inner().map(|inner| inner.journals.interrupted()).unwrap_or_default();
        reports.iter().map(interrupted).collect()
    }

    fn resume_interrupted<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let inner = self.inner()?;
            Ok(inner.journals.resume(&inner.jobs, id).await?)
        })
    }

    fn drop_interrupted<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { Ok(self.inner()?.journals.give_up_failed(id).await?) })
    }

    fn nodes_added(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Ok(inner) = self.inner() else { return };
            for report in inner.stores.find_added().await {
                inner.tell(&Event::BitmapRecovered(recovered(&report)));
            }
            inner.find_jobs().await;
        })
    }

    fn nodes_going<'a>(&'a self, nodes: &'a [String]) -> BoxFuture<'a, Result<Box<dyn NodesGoing>>> {
        Box::pin(async move {
            let going = self.inner()?.stores.going(nodes).await?;
            Ok(Box::new(going) as Box<dyn NodesGoing>)
        })
    }

    fn apply<'a>(&'a self, file: &'a Path, wish: ApplyWish) -> BoxFuture<'a, Result<Applied>> {
        Box::pin(async move { self.inner()?.apply(file, wish).await })
    }

    fn quit(&self) {
        if let Ok(inner) = self.inner() {
            inner.quit.ring();
        }
    }
}

/// What a monitor says of an export.
fn new_export(export: NbdExport) -> NewExport {
    NewExport {
        id: export.id,
        target: export.node_name,
        name: export.name,
        description: export.description.unwrap_or_default(),
        writable: export.writable,
        writethrough: export.writethrough,
        bitmaps: export.bitmaps,
        live_bitmaps: false,
        allocation_depth: export.allocation_depth,
        allow_inactive: export.allow_inactive,
        thread: export.thread,
        tls: None,
    }
}

/// What became of a bitmap, as monitors hear of it.
pub(crate) fn recovered(report: &Recovered) -> RecoveredBitmap {
    let (extents, bytes) = match report.trust {
        Trust::Superset { extents, bytes } => (Some(extents), Some(bytes)),
        _ => (None, None),
    };
    RecoveredBitmap {
        node: report.owner.clone(),
        name: report.name.clone(),
        verdict: report.trust.word().to_owned(),
        extents,
        bytes,
        reason: report.trust.reason().map(str::to_owned),
    }
}

/// What became of a job, as monitors hear of it.
pub(crate) fn interrupted(report: &Interrupted) -> InterruptedJob {
    InterruptedJob {
        id: report.id.clone(),
        kind: report.kind.map(str::to_owned),
        device: report.device.clone(),
        outcome: report.outcome.word().to_owned(),
        reason: report.reason.clone(),
        left: report.left,
    }
}

/// Takes the place where monitors connect.
pub(crate) fn bind(address: &Address) -> io::Result<Listener> {
    Ok(match address {
        Address::Unix(path) => UnixListener::bind(path)?.into(),
        Address::Tcp(address) => TcpListener::bind(address.as_str())?.into(),
        _ => return Err(io::ErrorKind::Unsupported.into()),
    })
}

/// Lets in whom the object of this id allows at that time.
fn authorize(objects: &Objects, id: String) -> Authorize {
    let objects = objects.clone();
    Authorize::new(move |name| objects.authorize(&id, name).map_err(|error| error.desc))
}

/// Loads the certificates that an object names.
fn server_tls(object: &TlsX509) -> Result<ServerTls> {
    creds_of(object)?.server().map_err(Error::generic)
}

fn creds_of(object: &TlsX509) -> Result<TlsCreds> {
    if object.passwordid.is_some() {
        return Err(Error::generic("Parameter 'passwordid' is not supported: keys have no password here"));
    }
    Ok(TlsCreds {
        dir: absolute(&object.dir).unwrap_or_else(|_| object.dir.clone()),
        endpoint: match object.endpoint {
            Endpoint::Client => TlsEnd::Client,
            Endpoint::Server => TlsEnd::Server,
        },
        verify_peer: object.verify_peer,
        sanity_check: object.sanity_check,
    })
}

/// Certificates of objects are loaded when those are added, for nodes that name them afterwards.
pub(crate) fn load_certificates(objects: &Objects, registry: &TlsRegistry) {
    let known = registry.clone();
    objects.on_add(move |id, object| match object {
        Object::TlsX509(object) => known.add(id, &creds_of(object)?).map_err(Error::generic),
        _ => Ok(()),
    });
    // Ids are those of objects of all kinds, so only that of one of ours can be meant.
    let (known, kinds) = (registry.clone(), Mutex::new(BTreeSet::new()));
    objects.on_change(move |id, change| match change {
        ObjectChange::Added(Object::TlsX509(_)) => drop(kinds.lock().insert(id.to_owned())),
        ObjectChange::Removed if kinds.lock().remove(id) => drop(known.remove(id)),
        _ => {}
    });
}
