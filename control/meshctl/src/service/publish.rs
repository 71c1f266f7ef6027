//! The values of `--publish` and `--network`, in Docker's short and long forms.

use mesh_api::{NetworkTarget, Port};

/// `[PUBLISHED:]TARGET[/PROTOCOL]` with ranges, or `published=…,target=…,protocol=…,mode=ingress`.
pub(super) fn parse(text: &str) -> Result<Vec<Port>, String> {
    if text.contains('=') { long(text).map(|port| vec![port]) } else { short(text) }
}

fn long(text: &str) -> Result<Port, String> {
    let mut port =
        Port { protocol: "tcp".into(), publish_mode: "ingress".into(), ..Port::default() };
    for field in text.split(',') {
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| format!("invalid field `{field}`: expected key=value"))?;
        match key.trim() {
            "published" | "publish" => port.published_port = number(value)?.into(),
            "target" => port.target_port = number(value)?.into(),
            "protocol" => port.protocol = protocol(value)?,
            "mode" if value == "ingress" => {}
            "mode" if value == "host" => {
                return Err("mode=host is not implemented yet by mesh: use mode=ingress".into());
            }
            other => {
                return Err(format!(
                    "invalid field `{other}={value}`: use published, target, protocol and \
                     mode=ingress"
                ));
            }
        }
    }
    if port.target_port == 0 {
        return Err("the target port is missing: add target=PORT".into());
    }
    Ok(port)
}

fn short(text: &str) -> Result<Vec<Port>, String> {
    let (ports, protocol_name) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol(protocol_name)?;
    let (published, target) = match ports.rsplit_once(':') {
        Some((published, _)) if published.contains(':') => {
            return Err(
                "publishing on one address is not implemented yet by mesh: leave the address out"
                    .into(),
            );
        }
        Some((published, target)) => (Some(range(published)?), range(target)?),
        None => (None, range(ports)?),
    };
    if published.is_some_and(|published| published.1 - published.0 != target.1 - target.0) {
        return Err("the two ranges of ports have different lengths".into());
    }
    let port = |at: u16| Port {
        name: String::new(),
        protocol: protocol.clone(),
        target_port: u32::from(target.0 + at),
        published_port: published.map_or(0, |published| u32::from(published.0 + at)),
        publish_mode: "ingress".into(),
    };
    Ok((0..=target.1 - target.0).map(port).collect())
}

fn protocol(text: &str) -> Result<String, String> {
    match text {
        "tcp" | "udp" => Ok(text.to_owned()),
        "sctp" => Err("protocol sctp is not implemented yet by mesh: use tcp or udp".into()),
        _ => Err(format!("unknown protocol `{text}`: use tcp or udp")),
    }
}

fn number(text: &str) -> Result<u16, String> {
    text.parse::<u16>()
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| format!("`{text}` is not a port: use 1 to 65535"))
}

fn range(text: &str) -> Result<(u16, u16), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    if first <= last { Ok((first, last)) } else { Err(format!("the range {text} is upside down")) }
}

/// `NAME`, or `name=NAME,alias=ALIAS`.
pub(super) fn network(text: &str) -> Result<NetworkTarget, String> {
    if !text.contains('=') {
        return Ok(NetworkTarget { target: text.to_owned(), aliases: Vec::new() });
    }
    let mut network = NetworkTarget::default();
    for field in text.split(',') {
        match field.split_once('=') {
            Some(("name", name)) => network.target = name.to_owned(),
            Some(("alias", alias)) => network.aliases.push(alias.to_owned()),
            _ => return Err(format!("invalid field `{field}`: use name=… and alias=…")),
        }
    }
    if network.target.is_empty() {
        return Err("the network's name is missing: add name=…".into());
    }
    Ok(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(u32, u32)> {
        parse(text).unwrap().iter().map(|p| (p.published_port, p.target_port)).collect()
    }

    #[test]
    fn both_forms_are_read() {
        assert_eq!(pairs("8080:80"), [(8080, 80)]);
        assert_eq!(pairs("80"), [(0, 80)]);
        assert_eq!(pairs("8080-8081:80-81/udp"), [(8080, 80), (8081, 81)]);
        assert_eq!(pairs("published=8080,target=80,protocol=udp,mode=ingress"), [(8080, 80)]);
        assert_eq!(parse("53:53/udp").unwrap()[0].protocol, "udp");
    }

    #[test]
    fn what_cannot_be_published_is_named() {
        for (text, word) in [
            ("mode=host,target=80", "mode=host"),
            ("80:80/sctp", "sctp"),
            ("127.0.0.1:80:80", "one address"),
            ("0:80", "`0`"),
            ("70000:80", "70000"),
            ("82-80:80-82", "upside down"),
            ("80-81:80", "different lengths"),
            ("published=80", "target"),
            ("target=80,name=x", "name=x"),
            ("", "not a port"),
        ] {
            let err = parse(text).unwrap_err();
            assert!(err.contains(word), "{text}: {err}");
        }
    }

    #[test]
    fn networks_may_have_aliases() {
        assert_eq!(network("app").unwrap().target, "app");
        let long = network("name=app,alias=a,alias=b").unwrap();
        assert_eq!((long.target.as_str(), long.aliases.len()), ("app", 2));
        assert!(network("alias=a").is_err());
        assert!(network("name=app,driver-opt=x").is_err());
    }
}
