//! Labs and what must hold in them. `cargo test --workspace --test lab -- NAME` runs the cases
//! whose name contains NAME; `MESH_TESTS_KEEP=1` leaves the lab up. Plans run side by side, in this
//! order: what takes longest comes first.

use std::process::ExitCode;

use mesh_lab::Topology;
use mesh_tests::{
    cases,
    runner::{Group, Plan, run},
};

/// What depends on how packets travel.
const DATA_PLANE: &[Group] = &[
    cases::network::GROUP,
    cases::vip::GROUP,
    cases::mesh::GROUP,
    cases::dns::GROUP,
    cases::security::GROUP,
    cases::gateway::GROUP,
    cases::heal::GROUP,
];

const FIVE: Topology = Topology { managers: 3, workers: 2, mtu: 1500 };

fn main() -> ExitCode {
    run(&[
        Plan {
            name: "direct",
            topology: FIVE,
            cluster: true,
            meshd_args: &["--metrics-addr", "0.0.0.0:9323"],
            alone: false,
            groups: &[
                cases::cluster::GROUP,
                cases::service::GROUP,
                cases::logs::GROUP,
                cases::cli::GROUP,
                cases::node::GROUP,
                cases::metrics::GROUP,
                cases::network::GROUP,
                cases::vip::GROUP,
                cases::mesh::GROUP,
                cases::dns::GROUP,
                cases::security::GROUP,
                cases::gateway::GROUP,
                cases::heal::GROUP,
            ],
        },
        Plan {
            name: "roles",
            topology: FIVE,
            cluster: true,
            meshd_args: &["--log-format", "json"],
            alone: false,
            groups: &[
                cases::roles::GROUP,
                cases::keys::GROUP,
                cases::swarm::GROUP,
                cases::resources::GROUP,
                cases::events::GROUP,
                cases::logging::GROUP,
            ],
        },
        Plan {
            name: "fallback",
            topology: FIVE,
            cluster: true,
            meshd_args: &["--vxlan-via-device"],
            alone: false,
            groups: DATA_PLANE,
        },
        Plan {
            name: "hand",
            topology: Topology { managers: 1, workers: 1, mtu: 1500 },
            cluster: false,
            meshd_args: &[],
            alone: false,
            groups: &[cases::lab::GROUP, cases::join::GROUP],
        },
        Plan {
            name: "five",
            topology: Topology { managers: 5, workers: 0, mtu: 1500 },
            cluster: true,
            meshd_args: &[],
            alone: true,
            groups: &[cases::raft::GROUP],
        },
        Plan {
            name: "jumbo",
            topology: Topology { managers: 1, workers: 1, mtu: 9000 },
            cluster: true,
            meshd_args: &[],
            alone: false,
            groups: &[cases::jumbo::GROUP],
        },
        Plan {
            name: "few",
            topology: FIVE,
            cluster: true,
            meshd_args: &["--fault-watchers", "2"],
            alone: true,
            groups: &[cases::gossip::GROUP, cases::paths::GROUP],
        },
        Plan {
            name: "trust",
            topology: FIVE,
            cluster: true,
            meshd_args: &[],
            alone: true,
            groups: &[
                cases::trust::GROUP,
                cases::paths::GROUP,
                cases::restart::GROUP,
                cases::churn::GROUP,
            ],
        },
    ])
}
