//! Objects that drivers of the graph keep for their nodes, such as throttle groups: what happens to one here happens to it
//! there. A driver that is not loaded has nodes for nobody, so it misses nothing.

use super::{Object, Objects};
use crate::error::{Error, Result};
use driveline_graph::{Graph, Kind, ObjectCall, Options};
use serde_json::{Map, Value};

impl Objects {
    /// From now on a throttle group here is one that nodes of the graph can name, and one that a node names is not deleted.
    /// The first call counts. Groups that are there already are made there, too.
    ///
    /// Errors: the driver takes one of them not.
    pub fn keep_in(&self, graph: &Graph) -> Result<()> {
        if self.0.graph.set(graph.clone()).is_err() {
            return Ok(());
        }
        for (id, _) in self.list() {
            if let Some(object) = self.get(&id) {
                self.create_kept(&id, &object)?;
            }
        }
        Ok(())
    }

    /// Does something with an object in its driver. `None`: none of the known drivers keeps it.
    fn kept(
        &self,
        id: &str,
        object: &Object,
        call: ObjectCall<'_>,
    ) -> Option<driveline_graph::Result<Options>> {
        let graph = self.0.graph.get()?;
        let kind = object.type_name();
        graph.object_kinds().iter().any(|known| known == kind).then(|| graph.object(kind, id, call))
    }

    pub(super) fn create_kept(&self, id: &str, object: &Object) -> Result<()> {
        self.told(self.kept(id, object, ObjectCall::Create(&limits_of(object))))
    }

    pub(super) fn change_kept(&self, id: &str, object: &Object) -> Result<()> {
        self.told(self.kept(id, object, ObjectCall::Set(&limits_of(object))))
    }

    /// Ends it there, unless a node uses it.
    pub(super) fn delete_kept(&self, id: &str, object: &Object) -> Result<()> {
        match self.kept(id, object, ObjectCall::Delete) {
            // A driver that was loaded after the object was made never heard of it.
            Some(Err(error)) if error.kind() == Kind::NotFound => Ok(()),
            answer => self.told(answer),
        }
    }

    fn told(&self, answer: Option<driveline_graph::Result<Options>>) -> Result<()> {
        match answer {
            Some(Err(error)) => Err(Error::generic(error.message())),
            _ => Ok(()),
        }
    }
}

/// What is passed on: the limits, all of them.
fn limits_of(object: &Object) -> Map<String, Value> {
    let mut properties = object.properties();
    properties.shift_remove("limits").map(|limits| ("limits".to_owned(), limits)).into_iter().collect()
}
