//! What comes in: JSON bodies, query parameters, filters. Malformed input ends here, in Docker's
//! words.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use axum::{
    body::to_bytes,
    extract::{FromRequest, FromRequestParts, Query, Request},
    http::{StatusCode, header, request::Parts},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use super::ApiError;

/// A body must be there within this time.
const BODY: Duration = Duration::from_secs(30);

/// The most that is read of a request's body, in bytes: see [`super::routes::Rule::body`].
#[derive(Debug, Clone, Copy)]
pub(super) struct BodyLimit(pub(super) usize);

/// A request's JSON body, not interpreted yet.
#[derive(Debug)]
pub(super) struct Body(Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let content_type = request
            .headers()
            .get(header::CONTENT_TYPE)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .unwrap_or_default();
        let BodyLimit(limit) = request.extensions().get().copied().unwrap_or(BodyLimit(0));
        let too_large = || {
            ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("request body too large: at most {limit} bytes are accepted"),
            )
        };
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > limit as u64) {
            return Err(too_large());
        }
        let bytes = timeout(BODY, to_bytes(request.into_body(), limit)).await;
        let late = |_| {
            ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("the request's body did not come within {} s", BODY.as_secs()),
            )
        };
        // The error is the limit's or a broken connection, whose client reads no answer.
        let bytes = bytes.map_err(late)?.map_err(|_| too_large())?;
        let media = content_type.split(';').next().unwrap_or_default().trim();
        if !bytes.is_empty() && !media.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::bad_request(format!(
                "unsupported Content-Type header ({content_type}): must be 'application/json'"
            )));
        }
        Ok(Self(bytes))
    }
}

/// Takes in the body of a request that is refused: a client that still sends it would see a broken
/// connection instead of the answer.
pub(super) async fn discard(request: Request) {
    let BodyLimit(limit) = request.extensions().get().copied().unwrap_or(BodyLimit(0));
    // One that is too large or too slow is no concern of ours.
    let _ = timeout(BODY, to_bytes(request.into_body(), limit)).await;
}

impl Body {
    #[cfg(fuzzing)]
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(Bytes::copy_from_slice(bytes))
    }

    /// The body as it was sent.
    pub(super) fn value(&self) -> Result<Value, ApiError> {
        if self.0.is_empty() {
            return Err(ApiError::bad_request("invalid JSON: got EOF while reading request body"));
        }
        let value: Value = serde_json::from_slice(&self.0)
            .map_err(|err| ApiError::bad_request(format!("invalid JSON: {err}")))?;
        if value.is_object() {
            Ok(value)
        } else {
            Err(ApiError::bad_request("invalid JSON: expected an object"))
        }
    }

    /// The body as a typed request. Unknown fields are ignored, as Docker does.
    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        typed(self.value()?)
    }
}

/// A JSON value as a typed request.
pub(super) fn typed<T: DeserializeOwned>(mut value: Value) -> Result<T, ApiError> {
    strip_nulls(&mut value);
    serde_json::from_value(value)
        .map_err(|err| ApiError::bad_request(format!("invalid JSON: {err}")))
}

/// Go writes nil maps and slices as `null`: the same as leaving them out.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// A request's query parameters.
#[derive(Debug)]
pub(super) struct Params(BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::try_from_uri(&parts.uri)
            .map(|Query(params)| Self(params))
            .map_err(|err| ApiError::bad_request(err.body_text()))
    }
}

impl Params {
    /// A parameter's text; empty if it is absent.
    pub(super) fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// Docker's reading of a boolean: anything but empty, 0, no, false and none is true.
    pub(super) fn flag(&self, name: &str) -> bool {
        !matches!(
            self.text(name).trim().to_ascii_lowercase().as_str(),
            "" | "0" | "no" | "false" | "none"
        )
    }

    /// The version that an update was made from; `what` names the object's kind.
    pub(super) fn version(&self, what: &str) -> Result<u64, ApiError> {
        let text = self.text("version");
        text.parse().map_err(|_| {
            ApiError::bad_request(format!(
                "invalid {what} version '{text}': strconv.ParseUint: parsing \"{text}\": invalid \
                 syntax"
            ))
        })
    }

    /// The filters, of which only those in `known` may be used.
    pub(super) fn filters(&self, known: &[&str]) -> Result<Filters, ApiError> {
        Filters::parse(self.text("filters"), known)
    }
}

/// Conditions on a list: values of one key are alternatives, keys come together.
#[derive(Debug, Default)]
pub(super) struct Filters(BTreeMap<String, BTreeSet<String>>);

impl Filters {
    pub(super) fn parse(text: &str, known: &[&str]) -> Result<Self, ApiError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let invalid = || ApiError::bad_request("invalid filter");
        let object: serde_json::Map<String, Value> =
            serde_json::from_str(text).map_err(|_| invalid())?;
        let mut filters = BTreeMap::new();
        for (key, values) in object {
            if !known.contains(&key.as_str()) {
                return Err(ApiError::bad_request(format!("invalid filter '{key}'")));
            }
            // The CLI sends a map of maps, docker-py a map of lists.
            let values: BTreeSet<String> = match values {
                Value::Object(set) => set
                    .into_iter()
                    .filter(|(_, on)| *on != Value::Bool(false))
                    .map(|(v, _)| v)
                    .collect(),
                Value::Array(list) => list
                    .into_iter()
                    .map(|value| match value {
                        Value::String(text) => Ok(text),
                        Value::Bool(on) => Ok(on.to_string()),
                        Value::Number(number) => Ok(number.to_string()),
                        _ => Err(invalid()),
                    })
                    .collect::<Result<_, _>>()?,
                _ => return Err(invalid()),
            };
            if !values.is_empty() {
                filters.insert(key, values);
            }
        }
        Ok(Self(filters))
    }

    /// The values asked for under a key, if it is filtered at all.
    pub(super) fn values(&self, key: &str) -> Option<&BTreeSet<String>> {
        self.0.get(key)
    }

    /// Whether one of the values passes; true when the key is not filtered.
    pub(super) fn any(&self, key: &str, test: impl Fn(&str) -> bool) -> bool {
        self.values(key).is_none_or(|values| values.iter().any(|value| test(value)))
    }

    /// `label=key` and `label=key=value`; unlike other keys all have to match.
    pub(super) fn labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key).is_none_or(|values| {
            values.iter().all(|wanted| match wanted.split_once('=') {
                Some((name, value)) => labels.get(name).is_some_and(|have| have == value),
                None => labels.contains_key(wanted),
            })
        })
    }

    /// `label!=key` and `label!=key=value`: none may match.
    pub(super) fn no_labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key).is_none_or(|values| {
            !values.iter().any(|unwanted| match unwanted.split_once('=') {
                Some((name, value)) => labels.get(name).is_some_and(|have| have == value),
                None => labels.contains_key(unwanted),
            })
        })
    }

    /// Refuses values of a key outside of a fixed set: 500, as Docker does.
    pub(super) fn only(&self, key: &str, allowed: &[&str]) -> Result<(), ApiError> {
        let bad = self
            .values(key)
            .and_then(|values| values.iter().find(|value| !allowed.contains(&value.as_str())));
        match bad {
            Some(bad) => Err(ApiError::internal(format!("Invalid {key} filter: '{bad}'"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_forms_of_filters_mean_the_same() {
        for text in [r#"{"name":{"a":true,"b":true}}"#, r#"{"name":["a","b"]}"#] {
            let filters = Filters::parse(text, &["name"]).unwrap();
            assert!(filters.any("name", |name| name == "a"));
            assert!(!filters.any("name", |name| name == "c"));
            assert!(filters.any("id", |_| false));
        }
    }

    #[test]
    fn bad_filters_are_named() {
        let message = |text| Filters::parse(text, &["name"]).unwrap_err().message;
        assert_eq!(message("{"), "invalid filter");
        assert_eq!(message(r#"["name"]"#), "invalid filter");
        assert_eq!(message(r#"{"bogus":["x"]}"#), "invalid filter 'bogus'");
    }

    #[test]
    fn labels_match_by_key_or_by_value() {
        let labels = BTreeMap::from([("tier".to_owned(), "web".to_owned())]);
        let matches =
            |text: &str| Filters::parse(text, &["label"]).unwrap().labels("label", &labels);
        assert!(matches(r#"{"label":["tier"]}"#) && matches(r#"{"label":["tier=web"]}"#));
        assert!(!matches(r#"{"label":["tier=db"]}"#) && !matches(r#"{"label":["tier","x"]}"#));
    }

    #[test]
    fn null_is_absent() {
        let spec: mesh_api::NetworkCreate =
            typed(serde_json::json!({"Name": "a", "Labels": null, "IPAM": {"Config": null}}))
                .unwrap();
        assert_eq!(spec.name, "a");
    }

    proptest! {
        #[test]
        fn no_filter_text_panics(text in ".{0,80}") {
            let _ = Filters::parse(&text, &["name"]);
        }
    }
}
