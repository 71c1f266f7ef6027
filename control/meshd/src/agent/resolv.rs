//! A task's `/etc/resolv.conf`.

use mesh_types::spec::DnsSpec;

/// The node's resolver, with the service's search list and options. The service's own servers are
/// not in it: the resolver asks them, so that names of the cluster are found all the same.
pub(super) fn resolv_conf(usual: &str, dns: &DnsSpec) -> String {
    if dns.search.is_empty() && dns.options.is_empty() {
        return usual.to_owned();
    }
    let mut text = String::new();
    for line in usual.lines().filter(|line| line.starts_with("nameserver")) {
        text.push_str(line);
        text.push('\n');
    }
    if !dns.search.is_empty() {
        text.push_str(&format!("search {}\n", dns.search.join(" ")));
    }
    // Names of the cluster have no dots, and are asked as they are first.
    let ndots =
        (!dns.options.iter().any(|option| option.starts_with("ndots:"))).then_some("ndots:0");
    let options: Vec<&str> = dns.options.iter().map(String::as_str).chain(ndots).collect();
    text.push_str(&format!("options {}\n", options.join(" ")));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::AgentConfig;

    #[test]
    fn it_says_what_the_service_says() {
        let usual = AgentConfig::RESOLV_CONF;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let text = |search: &[&str], options: &[&str]| {
            let servers = vec!["192.0.2.1".parse().unwrap()];
            let (search, options) = (words(search), words(options));
            resolv_conf(usual, &DnsSpec { servers, search, options })
        };
        assert_eq!(text(&[], &[]), usual);
        assert_eq!(
            text(&["a.test", "b.test"], &[]),
            "nameserver 127.0.0.11\nsearch a.test b.test\noptions ndots:0\n"
        );
        assert_eq!(
            text(&[], &["rotate", "ndots:2"]),
            "nameserver 127.0.0.11\noptions rotate ndots:2\n"
        );
    }
}
