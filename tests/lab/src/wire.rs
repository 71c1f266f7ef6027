//! The links of a lab: a bridge in the router's namespace as underlay switch, one veth from it to
//! each node, one from the router to the client. A port has the name of the node that it leads to.

use std::{fs::File, os::fd::AsRawFd, thread};

use anyhow::{Context, Result, anyhow};
use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    new_connection,
    packet_route::link::{InfoData, InfoVeth},
};

use crate::topology::{
    Member, PREFIX, PREFIX6, ROUTER, ROUTER_OUTSIDE, ROUTER_OUTSIDE6, ROUTER6, Role, Topology,
};

/// The underlay switch, in the router's namespace.
const SWITCH: &str = "underlay";
/// A machine's own link.
pub(crate) const UPLINK: &str = "eth0";

/// Runs `work` on a thread of its own inside a network namespace.
pub(crate) fn on_thread_in<T: Send>(
    netns: &File,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        });
        worker.join().map_err(|_| anyhow!("the thread in the network namespace panicked"))?
    })
}

/// Runs netlink work inside a network namespace.
fn inside<T: Send, F: Future<Output = Result<T>>>(
    netns: &File,
    work: impl FnOnce(Handle) -> F + Send,
) -> Result<T> {
    on_thread_in(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().context("open rtnetlink")?;
            tokio::spawn(connection);
            work(handle).await
        })
    })
}

/// Makes the switch, and the router's side of everything.
pub(crate) fn set_up_router(router: &File) -> Result<()> {
    inside(router, async |handle| {
        loopback_up(&handle).await?;
        handle
            .link()
            .add(LinkBridge::new(SWITCH).build())
            .execute()
            .await
            .context("make the underlay switch")?;
        let switch = index_of(&handle, SWITCH).await?;
        add_address(&handle, switch, ROUTER.into(), PREFIX).await?;
        add_address(&handle, switch, ROUTER6.into(), PREFIX6).await
    })
}

/// Makes the link of one machine, from the router's namespace to `netns`, and addresses both ends.
pub(crate) fn connect(
    router: &File,
    member: &Member,
    netns: &File,
    topology: &Topology,
) -> Result<()> {
    let client = member.role == Role::Client;
    // Only the underlay has the lab's MTU: the world outside is an ordinary Ethernet.
    let mtu = if client { 1500 } else { topology.mtu };
    inside(router, async |handle| {
        let far_end = LinkMessageBuilder::<LinkUnspec>::new()
            .name(UPLINK)
            .address(member.mac().to_vec())
            .mtu(mtu)
            .setns_by_fd(netns.as_raw_fd())
            .build();
        let mut link = LinkVeth::new(&member.name, UPLINK)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far_end)))
            .mtu(mtu)
            .up();
        if !client {
            link = link.controller(index_of(&handle, SWITCH).await?);
        }
        handle
            .link()
            .add(link.build())
            .execute()
            .await
            .with_context(|| format!("make the link to {}", member.name))?;
        if client {
            let port = index_of(&handle, &member.name).await?;
            add_address(&handle, port, ROUTER_OUTSIDE.into(), PREFIX).await?;
            add_address(&handle, port, ROUTER_OUTSIDE6.into(), PREFIX6).await?;
        }
        Ok(())
    })?;
    inside(netns, async |handle| set_up_end(&handle, member).await)
}

/// The machine's side: addresses and default routes.
async fn set_up_end(handle: &Handle, member: &Member) -> Result<()> {
    loopback_up(handle).await?;
    let uplink = index_of(handle, UPLINK).await?;
    set_link(handle, UPLINK, true).await?;
    add_address(handle, uplink, member.address.into(), PREFIX).await?;
    add_address(handle, uplink, member.address6.into(), PREFIX6).await?;
    let Some((gateway, gateway6)) = member.gateway() else { return Ok(()) };
    let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new().gateway(gateway).build();
    handle.route().add(route).execute().await.context("add the default route")?;
    let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new().gateway(gateway6).build();
    handle.route().add(route).execute().await.context("add the default route of IPv6")
}

/// Cuts or restores a node's link, at the switch: the node sees its carrier go, like a pulled
/// cable, and keeps its addresses and routes.
pub(crate) fn set_port(router: &File, node: &str, up: bool) -> Result<()> {
    inside(router, async |handle| set_link(&handle, node, up).await)
}

/// Removes a node's link, with both its ends.
pub(crate) fn remove_port(router: &File, node: &str) -> Result<()> {
    inside(router, async |handle| {
        let port = LinkUnspec::new_with_name(node).build();
        handle
            .link()
            .del_with_message(port)
            .execute()
            .await
            .with_context(|| format!("remove the link to {node}"))
    })
}

/// Removes every link of a namespace that is about to go. The kernel would do it too, but some
/// time after the last process; what hangs on the links (programs, peers) would seem left over.
pub(crate) fn remove_links(netns: &File) -> Result<()> {
    inside(netns, async |handle| {
        let mut links = handle.link().get().execute();
        let mut indices = Vec::new();
        while let Some(link) = links.try_next().await.context("list links")? {
            indices.push(link.header.index);
        }
        for index in indices {
            // One end of a pair takes the other along, and some (lo, sit0) cannot go: no matter.
            let _ = handle.link().del(index).execute().await;
        }
        Ok(())
    })
}

async fn loopback_up(handle: &Handle) -> Result<()> {
    set_link(handle, "lo", true).await
}

async fn set_link(handle: &Handle, name: &str, up: bool) -> Result<()> {
    let link = LinkUnspec::new_with_name(name);
    let link = if up { link.up() } else { link.down() };
    let state = if up { "up" } else { "down" };
    handle
        .link()
        .set(link.build())
        .execute()
        .await
        .with_context(|| format!("set link {name} {state}"))
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    let link = found.try_next().await.with_context(|| format!("find link {name}"))?;
    Ok(link.with_context(|| format!("there is no link {name}"))?.header.index)
}

async fn add_address(
    handle: &Handle,
    link: u32,
    address: std::net::IpAddr,
    prefix: u8,
) -> Result<()> {
    let request = handle.address().add(link, address, prefix);
    request.execute().await.with_context(|| format!("add address {address}/{prefix}"))
}

/// Tries something out in a namespace that ends with the thread.
pub(crate) fn probe(work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    thread::scope(|scope| {
        let probe = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("network namespaces")?;
            work()
        });
        probe.join().map_err(|_| anyhow!("the probe panicked"))?
    })
}

/// Tries out whether the kernel can make a switch, in a namespace that ends with the thread.
pub(crate) fn probe_bridge() -> Result<()> {
    let probe = || {
        unshare(CloneFlags::CLONE_NEWNET).context("network namespaces")?;
        let own = File::open("/proc/thread-self/ns/net").context("open the own namespace")?;
        inside(&own, async |handle| {
            let made = handle.link().add(LinkBridge::new(SWITCH).build()).execute().await;
            made.context("links of kind bridge")
        })
    };
    thread::spawn(probe).join().map_err(|_| anyhow!("the probe panicked"))?
}
