//! Flags and verbs that Docker has and mesh does not have yet: refused as that, not as a typing
//! error.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Per verb, Docker's flags that are not implemented.
const FLAGS: &[(&str, &[&str])] = &[
    (
        "service create",
        &[
            "--cap-add",
            "--cap-drop",
            "--config",
            "--credential-spec",
            "--dns",
            "--dns-option",
            "--dns-search",
            "--entrypoint",
            "--env-file",
            "--generic-resource",
            "--group",
            "--health-cmd",
            "--health-interval",
            "--health-retries",
            "--health-start-interval",
            "--health-start-period",
            "--health-timeout",
            "--host",
            "--init",
            "--isolation",
            "--limit-cpu",
            "--limit-memory",
            "--limit-pids",
            "--log-driver",
            "--log-opt",
            "--max-concurrent",
            "--memory-swap",
            "--memory-swappiness",
            "--mount",
            "--no-healthcheck",
            "--oom-score-adj",
            "--placement-pref",
            "--read-only",
            "--replicas-max-per-node",
            "--reserve-cpu",
            "--reserve-memory",
            "--secret",
            "--sysctl",
            "--tty",
            "-t",
            "--ulimit",
            "--user",
            "-u",
            "--with-registry-auth",
        ],
    ),
    (
        "service update",
        &[
            "--cap-add",
            "--cap-drop",
            "--config-add",
            "--config-rm",
            "--container-label-add",
            "--container-label-rm",
            "--endpoint-mode",
            "--entrypoint",
            "--host-add",
            "--hostname",
            "--image",
            "--label-add",
            "--label-rm",
            "--limit-cpu",
            "--limit-memory",
            "--mount-add",
            "--mount-rm",
            "--network-add",
            "--network-rm",
            "--placement-pref-add",
            "--publish-add",
            "--publish-rm",
            "--replicas-max-per-node",
            "--reserve-cpu",
            "--reserve-memory",
            "--restart-condition",
            "--restart-delay",
            "--restart-max-attempts",
            "--restart-window",
            "--secret-add",
            "--secret-rm",
            "--stop-grace-period",
            "--stop-signal",
            "--user",
            "--workdir",
        ],
    ),
    (
        "network create",
        &[
            "--aux-address",
            "--config-from",
            "--config-only",
            "--ingress",
            "--ipam-driver",
            "--ipam-opt",
            "--ipv4",
            "--ipv6",
            "--scope",
        ],
    ),
    (
        "swarm init",
        &[
            "--autolock",
            "--dispatcher-heartbeat",
            "--external-ca",
            "--force-new-cluster",
            "--max-snapshots",
            "--snapshot-interval",
        ],
    ),
    ("node update", &["--role"]),
    ("node inspect", &["--pretty"]),
    ("service inspect", &["--pretty"]),
];

/// Docker's verbs that are not implemented, and what to do instead.
const VERBS: &[(&str, &str)] = &[
    ("service logs", "the output of a task is kept on its node"),
    ("node promote", "let the node leave and join again with the manager token"),
    ("node demote", "let the node leave and join again with the worker token"),
    ("network connect", "give the network to the service with --network"),
    ("network disconnect", "remove the service from the network by making it anew"),
    ("network prune", "`meshctl network rm` removes one by one"),
    ("swarm ca", "the root certificate is in `meshctl swarm inspect`"),
    ("swarm update", "the settings are chosen at `swarm init`"),
    ("swarm unlock", "clusters are not locked"),
    ("swarm unlock-key", "clusters are not locked"),
    ("stack", "create services one by one"),
    ("secret", "give values in the environment"),
    ("config", "give values in the environment"),
];

/// What to say in place of clap's own words.
pub(crate) fn explain(err: &clap::Error, raw: &[String]) -> Option<String> {
    let context = |kind| match err.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match err.kind() {
        ErrorKind::UnknownArgument => {
            let flag = context(ContextKind::InvalidArg)?;
            let flag = flag.split(['=', ' ']).next()?;
            let (verb, _) =
                FLAGS.iter().find(|(verb, flags)| flags.contains(&flag) && has_verb(raw, verb))?;
            Some(format!("{flag} of `docker {verb}` is not implemented yet by mesh: leave it out"))
        }
        ErrorKind::InvalidSubcommand => {
            let word = context(ContextKind::InvalidSubcommand)?;
            let (verb, instead) = VERBS.iter().find(|(verb, _)| {
                verb.split(' ').next_back() == Some(word) && has_verb(raw, verb)
            })?;
            Some(format!("`docker {verb}` is not implemented yet by meshctl: {instead}"))
        }
        _ => None,
    }
}

/// `; did you mean `NAME`?` where one of the names is near enough; nothing otherwise. What precedes
/// the name is `mark`.
pub(crate) fn did_you_mean<'a>(
    word: &str,
    names: impl Iterator<Item = &'a str>,
    mark: &str,
) -> String {
    let near = |name: &'a str| {
        let likeness = strsim::jaro_winkler(&word.to_lowercase(), &name.to_lowercase());
        (likeness > NEAR).then_some((likeness, name))
    };
    let nearest = names.filter_map(near).max_by(|(a, _), (b, _)| a.total_cmp(b));
    nearest.map_or_else(String::new, |(_, name)| format!("; did you mean `{mark}{name}`?"))
}

/// Names this like are taken for one another; 1 is the same.
const NEAR: f64 = 0.8;

/// Whether the words of a verb come one after the other on the command line.
fn has_verb(raw: &[String], verb: &str) -> bool {
    let words: Vec<&str> = verb.split(' ').collect();
    raw.windows(words.len()).any(|window| window.iter().zip(&words).all(|(a, b)| a == b))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn said(line: &str) -> Option<String> {
        let raw: Vec<String> = line.split(' ').map(str::to_owned).collect();
        explain(&crate::Cli::try_parse_from(&raw).unwrap_err(), &raw)
    }

    #[test]
    fn every_known_flag_is_refused_as_such() {
        for (verb, flags) in FLAGS {
            for flag in *flags {
                let text = said(&format!("meshctl {verb} {flag} x"));
                let text = text.unwrap_or_else(|| panic!("{verb} {flag} is not explained"));
                assert!(text.contains(flag) && text.contains("not implemented yet"), "{text}");
            }
        }
    }

    #[test]
    fn every_known_verb_is_refused_as_such() {
        for (verb, instead) in VERBS {
            assert!(said(&format!("meshctl {verb} x")).unwrap().contains(instead), "{verb}");
        }
        assert_eq!(said("meshctl service crate"), None);
        assert_eq!(said("meshctl service create --nosuch"), None);
    }
}
