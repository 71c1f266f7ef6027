//! The program is in the library, whose parsers others feed with what nobody would type.

use std::process::ExitCode;

fn main() -> ExitCode {
    meshctl::main()
}
