//! Placement as text: constraints, `node.labels.zone==a` or `node.role != manager`, and what tasks
//! are spread over, `node.labels.zone`.

use core::{fmt, str::FromStr};

use thiserror::Error;

use crate::spec::{Constraint, ConstraintKey, Spread};

/// What a node has that a constraint can look at, for people.
const KNOWN_KEYS: &str = "node.id, node.hostname, node.role, node.labels.KEY";

/// Why a text is not a constraint.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConstraintParseError {
    /// Neither `==` nor `!=`.
    #[error(
        "constraint `{0}` has no operator: expected KEY==VALUE or KEY!=VALUE, as in \
         `node.role==worker`"
    )]
    NoOperator(String),
    /// Nothing to compare with.
    #[error("constraint `{0}` has no value: expected one after the operator")]
    NoValue(String),
    /// Not a key that nodes have.
    #[error("constraint `{text}`: unknown key `{key}`; known are {KNOWN_KEYS}")]
    UnknownKey {
        /// The whole text.
        text: String,
        /// The part before the operator.
        key: String,
    },
    /// A role that no node can have.
    #[error("constraint `{0}`: a node's role is `manager` or `worker`")]
    UnknownRole(String),
}

impl FromStr for Constraint {
    type Err = ConstraintParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = [("==", true), ("!=", false)]
            .into_iter()
            .filter_map(|(operator, equal)| Some((text.find(operator)?, equal)))
            .min();
        let Some((at, equal)) = found else {
            return Err(ConstraintParseError::NoOperator(text.to_owned()));
        };
        // Both operators are two bytes long.
        let (key, value) = (text[..at].trim(), text[at + 2..].trim());
        if value.is_empty() {
            return Err(ConstraintParseError::NoValue(text.to_owned()));
        }
        let lower = key.to_ascii_lowercase();
        // The label's own name keeps its case.
        let label = lower.starts_with(LABEL).then(|| &key[LABEL.len()..]);
        let key = match (lower.as_str(), label) {
            (_, Some(label)) if !label.is_empty() => ConstraintKey::Label(label.to_owned()),
            ("node.id", _) => ConstraintKey::Id,
            ("node.hostname", _) => ConstraintKey::Hostname,
            ("node.role", _) => ConstraintKey::Role,
            _ => {
                let (text, key) = (text.to_owned(), key.to_owned());
                return Err(ConstraintParseError::UnknownKey { text, key });
            }
        };
        let role = |name: &str| value.eq_ignore_ascii_case(name);
        if key == ConstraintKey::Role && !role("manager") && !role("worker") {
            return Err(ConstraintParseError::UnknownRole(text.to_owned()));
        }
        Ok(Self { key, equal, value: value.to_owned() })
    }
}

const LABEL: &str = "node.labels.";

impl fmt::Display for ConstraintKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id => f.write_str("node.id"),
            Self::Hostname => f.write_str("node.hostname"),
            Self::Role => f.write_str("node.role"),
            Self::Label(label) => write!(f, "{LABEL}{label}"),
        }
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operator = if self.equal { "==" } else { "!=" };
        write!(f, "{}{operator}{}", self.key, self.value)
    }
}

/// Why a text is nothing to spread over.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("tasks cannot be spread over `{0}`: name a label of nodes, as in `node.labels.zone`")]
pub struct SpreadParseError(String);

impl FromStr for Spread {
    type Err = SpreadParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = text.get(..LABEL.len()).is_some_and(|start| start.eq_ignore_ascii_case(LABEL));
        let label = text.get(LABEL.len()..).filter(|label| known && !label.is_empty());
        let label = label.ok_or_else(|| SpreadParseError(text.to_owned()))?;
        Ok(Self { label: label.to_owned() })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{LABEL}{}", self.label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constraints_are_parsed_and_written() {
        let cases = [
            ("node.labels.zone==a", ConstraintKey::Label("zone".into()), true, "a"),
            ("node.labels.Zone == a b", ConstraintKey::Label("Zone".into()), true, "a b"),
            (" node.role!=manager ", ConstraintKey::Role, false, "manager"),
            ("Node.Hostname != n1", ConstraintKey::Hostname, false, "n1"),
            ("node.id==x!=y", ConstraintKey::Id, true, "x!=y"),
        ];
        for (text, key, equal, value) in cases {
            let parsed: Constraint = text.parse().unwrap();
            assert_eq!(parsed, Constraint { key, equal, value: value.into() }, "{text}");
            assert_eq!(parsed.to_string().parse::<Constraint>().unwrap(), parsed);
        }
        assert_eq!(
            "node.role != manager".parse::<Constraint>().unwrap().to_string(),
            "node.role!=manager"
        );
    }

    #[test]
    fn what_is_no_constraint_is_refused_with_the_remedy() {
        for text in ["", "node.role", "node.role=manager"] {
            let error = text.parse::<Constraint>().unwrap_err();
            assert_eq!(error, ConstraintParseError::NoOperator(text.into()));
        }
        assert_eq!(
            "node.id== ".parse::<Constraint>().unwrap_err(),
            ConstraintParseError::NoValue("node.id== ".into())
        );
        for text in ["node.labels.==a", "node.platform.os==linux", "==a", "engine.labels.x==a"] {
            let error = text.parse::<Constraint>().unwrap_err().to_string();
            assert!(error.ends_with(KNOWN_KEYS), "{error}");
        }
        assert!(matches!(
            "node.role==boss".parse::<Constraint>(),
            Err(ConstraintParseError::UnknownRole(_))
        ));
    }

    #[test]
    fn tasks_are_spread_over_labels_alone() {
        let zone: Spread = "Node.Labels.Zone".parse().unwrap();
        assert_eq!((zone.label.as_str(), &*zone.to_string()), ("Zone", "node.labels.Zone"));
        for text in
            ["", "zone", "node.labels.", "node.id", "engine.labels.x", "node.label\u{e9}s.x"]
        {
            let error = text.parse::<Spread>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("node.labels.zone"), "{error}");
        }
    }
}
