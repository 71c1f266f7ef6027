//! Names and queries as they are on the wire.

/// Bytes of the header (RFC 1035 section 4.1.1).
pub(crate) const HEADER_LEN: usize = 12;
/// A name without its root label: 255 bytes with it (RFC 1035 section 2.3.4).
pub(crate) const KEY_MAX: usize = 254;
const LABEL_MAX: usize = 63;
/// Type and class.
const QUESTION_END: usize = 4;
/// An OPT record without options: root, type, size, flags, length (RFC 6891 section 6.1.2).
pub(crate) const OPT_LEN: usize = 11;

pub(crate) const TYPE_A: u16 = 1;
pub(crate) const TYPE_SOA: u16 = 6;
pub(crate) const TYPE_AAAA: u16 = 28;
pub(crate) const TYPE_OPT: u16 = 41;
pub(crate) const CLASS_IN: u16 = 1;

/// A name as the index compares it: labels behind their lengths, without the root's zero, lower
/// case. Lengths are below 64, and so never taken for letters.
#[derive(Clone, Copy)]
pub(crate) struct Key {
    bytes: [u8; KEY_MAX],
    len: u8,
}

impl Key {
    /// Reads the name at the start of `bytes`. `None` if it is no whole name without pointers.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let mut len = 0;
        loop {
            let label = usize::from(*bytes.get(len)?);
            match label {
                0 => break,
                1..=LABEL_MAX => len += 1 + label,
                _ => return None,
            }
            if len > KEY_MAX {
                return None;
            }
        }
        Self::copy(bytes.get(..len)?)
    }

    /// A name given by its labels. `None` if there is none that has them.
    pub(crate) fn from_labels<'a>(labels: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let mut key = Self { bytes: [0; KEY_MAX], len: 0 };
        for label in labels {
            let len = u8::try_from(label.len()).ok().filter(|n| (1..=63).contains(n))?;
            let at = usize::from(key.len);
            *key.bytes.get_mut(at)? = len;
            key.bytes.get_mut(at + 1..at + 1 + label.len())?.copy_from_slice(label);
            key.len += 1 + len;
        }
        key.bytes.make_ascii_lowercase();
        Some(key)
    }

    /// A name as people write it. `None` if there is none like that.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        Self::from_labels(text.split('.').map(str::as_bytes))
    }

    fn copy(name: &[u8]) -> Option<Self> {
        let mut key = Self { bytes: [0; KEY_MAX], len: u8::try_from(name.len()).ok()? };
        let to = key.bytes.get_mut(..name.len())?;
        to.copy_from_slice(name);
        to.make_ascii_lowercase();
        Some(key)
    }

    /// Its bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

/// The labels of a key, and where each begins.
pub(crate) fn labels(key: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let begin = at;
        let len = usize::from(*key.get(begin)?);
        at = begin + 1 + len;
        Some((begin, key.get(begin + 1..at)?))
    })
}

/// The key as people write it.
pub(crate) fn text(key: &[u8]) -> String {
    let labels: Vec<_> = labels(key).map(|(_, label)| String::from_utf8_lossy(label)).collect();
    labels.join(".")
}

/// The queries that the fast path answers: one question of class IN, and nothing else but an OPT
/// record without options.
pub(crate) struct PlainQuery<'a> {
    /// The question as it came: letters as the asker wrote them, type and class.
    pub(crate) question: &'a [u8],
    /// The name asked for.
    pub(crate) key: Key,
    /// Its type.
    pub(crate) kind: u16,
    /// The size of answers that the asker takes, if it has EDNS.
    pub(crate) payload: Option<u16>,
}

impl<'a> PlainQuery<'a> {
    /// `None` for everything else: it takes the slow way.
    pub(crate) fn read(query: &'a [u8]) -> Option<Self> {
        let (header, rest) = query.split_first_chunk::<HEADER_LEN>()?;
        // Not a response, opcode 0, one question, no answers, no authorities.
        if header[2] & 0xf8 != 0 || header[4..10] != [0, 1, 0, 0, 0, 0] || header[10] != 0 {
            return None;
        }
        let key = Key::read(rest)?;
        let len = key.as_bytes().len() + 1 + QUESTION_END;
        let (question, rest) = rest.split_at_checked(len)?;
        let &[.., k0, k1, c0, c1] = question else { return None };
        if u16::from_be_bytes([c0, c1]) != CLASS_IN {
            return None;
        }
        let payload = match header[11] {
            0 if rest.is_empty() => None,
            1 => Some(opt_without_options(rest)?),
            _ => return None,
        };
        Some(Self { question, key, kind: u16::from_be_bytes([k0, k1]), payload })
    }
}

/// The size in an OPT record of version 0 that is all that there is.
fn opt_without_options(record: &[u8]) -> Option<u16> {
    let [0, t0, t1, s0, s1, _, version, _, _, l0, l1] = *record else { return None };
    let plain = u16::from_be_bytes([t0, t1]) == TYPE_OPT && (version, l0, l1) == (0, 0, 0);
    plain.then_some(u16::from_be_bytes([s0, s1]))
}
