//! Our nft table, as text for `nft -f`.

use ipnetwork::IpNetwork;

/// The table's name and family. It is ours alone; every other table is left as it is.
pub const TABLE: (&str, &str) = ("ip", "mesh");

/// The body of the table for the ranges that `gw0` addresses come from. Empty if there are none:
/// then there is no table.
///
/// - What leaves `gw0` for the outside is masqueraded as the node.
/// - `gw0`s do not reach each other through the host's routing.
/// - From outside only answers are forwarded to a `gw0`: published ports take the BPF path, and
///   nothing else is meant to come in.
#[must_use]
pub fn table(gateway_ranges: &[IpNetwork]) -> String {
    let mut ranges: Vec<String> = gateway_ranges
        .iter()
        .filter(|range| range.is_ipv4())
        .map(|range| format!("{}/{}", range.network(), range.prefix()))
        .collect();
    ranges.sort();
    ranges.dedup();
    if ranges.is_empty() {
        return String::new();
    }
    let ranges = ranges.join(", ");
    format!(
        "\tchain postrouting {{
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tip saddr {{ {ranges} }} oifname != \"mv*\" masquerade
\t}}
\tchain forward {{
\t\ttype filter hook forward priority filter; policy accept;
\t\tiifname \"mv*\" oifname \"mv*\" drop
\t\toifname \"mv*\" ct state != {{ established, related }} drop
\t}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let ranges = ["172.30.0.0/20", "10.0.0.7/24"].map(|range| range.parse().unwrap());
        assert_eq!(
            table(&ranges),
            "\tchain postrouting {
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tip saddr { 10.0.0.0/24, 172.30.0.0/20 } oifname != \"mv*\" masquerade
\t}
\tchain forward {
\t\ttype filter hook forward priority filter; policy accept;
\t\tiifname \"mv*\" oifname \"mv*\" drop
\t\toifname \"mv*\" ct state != { established, related } drop
\t}
"
        );
        assert_eq!(table(&[]), "");
    }
}
