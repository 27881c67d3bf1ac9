//! Plugins, good and bad, through a real `dlopen` and the real graph.

mod behaviour;
mod child;
mod drains;
mod loading;
mod logging;
mod panics;
mod probing;
mod sets;
mod versions;
mod world;
