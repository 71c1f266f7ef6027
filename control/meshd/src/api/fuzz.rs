//! What `cargo xtask fuzz` calls.

use mesh_api as api;
use mesh_control::store::Store;

use super::{
    convert,
    request::{Body, Filters, typed},
};

/// A request's body, the first byte says of which: it becomes a spec or an error, whatever it is.
pub fn body(store: &Store, data: &[u8]) {
    let Some((kind, json)) = data.split_first() else { return };
    let Ok(value) = Body::of(json).value() else { return };
    match kind % 6 {
        0 => {
            let Ok(spec) = convert::spec::service_spec(store, value) else { return };
            // What is kept of it is what `inspect` shows.
            let shown = convert::service::raw_spec(&spec);
            assert_eq!(shown["Name"].as_str().unwrap_or_default(), spec.name);
        }
        1 => drop(typed::<api::NetworkCreate>(value).and_then(convert::network::spec)),
        2 => drop(typed::<api::NodeSpec>(value).and_then(convert::node::spec)),
        3 => drop(typed::<api::SwarmInit>(value).and_then(convert::cluster::init)),
        4 => drop(typed::<api::SwarmJoin>(value).and_then(convert::cluster::join)),
        _ => drop(typed::<api::ClusterSpec>(value)),
    }
}

/// The text of a query's filters.
pub fn filters(text: &str) {
    let _ = Filters::parse(text, &["label", "name", "id"]);
}
