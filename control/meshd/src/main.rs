//! `meshd`: the daemon, and the small processes that it starts of itself (resolver, task shims).

use clap::Parser;
use meshd::options::Options;

/// The node daemon of mesh.
#[derive(Debug, Parser)]
#[command(name = "meshd", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn main() {
    let _ = Cli::parse();
}
