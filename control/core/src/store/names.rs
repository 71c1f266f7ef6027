//! Names of services and networks: they become DNS labels.

use crate::command::Rejection;

/// Checks a name as Swarm does: one DNS label of letters, digits, `-` and `_` that begins and ends
/// with a letter or digit.
///
/// # Errors
/// [`Rejection::Invalid`] in Swarm's words.
pub(super) fn check(name: &str) -> Result<(), Rejection> {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Err(Rejection::Invalid("meta: name must be provided".into()));
    }
    // RFC 1035 section 2.3.4.
    if bytes.len() > 63 {
        return Err(Rejection::Invalid("name must be 63 characters or fewer".into()));
    }
    if edge(bytes.first()) && edge(bytes.last()) && bytes.iter().copied().all(inner) {
        Ok(())
    } else {
        Err(Rejection::Invalid(format!("name must be valid as a DNS name component: `{name}`")))
    }
}

/// DNS does not tell upper from lower case (RFC 4343), so neither may names.
pub(super) fn same(a: &str, b: &str) -> bool {
    a.eq_ignore_ascii_case(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["web", "w", "my-app_2", "0", "A-b", &"a".repeat(63)] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["", "-web", "web-", "a.b", "a b", "ä", "_x", &"a".repeat(64)] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(same("Web", "wEB"));
    }
}
