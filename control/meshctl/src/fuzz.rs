//! What `cargo xtask fuzz` calls.

use serde_json::json;

use crate::output::{Format, template::Template};

/// A template: refused, or rendered, or an error.
pub fn template(text: &str) {
    let Ok(template) = text.parse::<Template>() else { return };
    let object = json!({
        "ID": "abc", "Name": "web", "Replicas": 3, "Ports": ["80", "443"],
        "Labels": {"a": "b"}, "Spec": {"Labels": {}, "Mode": null, "Deep": [{"x": 1.5}, true]},
    });
    let _ = template.render(&object);
    let _ = template.render_heading(&object);
    let _ = text.parse::<Format>();
}
