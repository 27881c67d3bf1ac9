//! Objects of drivers: what nodes share by name and is no node itself, such as the limits of a throttle group.
//!
//! A driver keeps them, and the graph only finds the driver: which objects there are besides (secrets, certificates), and
//! who may name them how, is the business of whoever lets users make them.

use crate::{
    driver::Options,
    error::{Error, Kind, Result},
    graph::Graph,
};

/// What is done with an object.
#[derive(Clone, Copy, Debug)]
pub enum ObjectCall<'a> {
    /// Would one with these properties be taken? It has no effect.
    Check(&'a Options),
    /// Makes one. What is not given is what it is by default.
    Create(&'a Options),
    /// Changes some properties, while nodes use it.
    Set(&'a Options),
    /// Asks for all properties.
    Get,
    /// Ends it.
    Delete,
}

impl Graph {
    /// The kinds of objects that the known drivers keep.
    pub fn object_kinds(&self) -> Vec<String> {
        self.drivers().into_iter().flat_map(|driver| driver.objects).map(Into::into).collect()
    }

    /// Does something with an object of a driver; see [`Driver::object`](crate::Driver::object).
    ///
    /// Errors: [`Kind::NotFound`] also for a kind that no driver keeps.
    ///
    /// ```
    /// # use driveline_graph::*;
    /// let graph = Graph::new(GraphOptions::default());
    /// let unknown = graph.object("throttle-group", "tenant", ObjectCall::Get).unwrap_err();
    /// assert_eq!(unknown.kind(), Kind::NotFound);
    /// ```
    pub fn object(&self, kind: &str, name: &str, call: ObjectCall<'_>) -> Result<Options> {
        let keeper = self.drivers().into_iter().find(|driver| driver.objects.iter().any(|its| its == kind));
        let Some(keeper) = keeper else {
            return Err(Error::new(
                Kind::NotFound,
                format_args!("no driver keeps objects of the kind '{kind}'"),
            ));
        };
        self.driver(&keeper.name)?.object(kind, name, call)
    }
}
