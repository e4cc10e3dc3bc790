"""Is the lab what the other tests take it for: machines that are apart, and that can be cut off and killed?"""

from tests.lab.lab import HEAD_ADDRESS, Lab, run


def test_nodes_reach_each_other_by_name_and_a_cut_cable_separates_them(lab: Lab) -> None:
    first, second = lab.nodes[:2]
    assert first.on("ssh", second.name, "hostname").stdout.strip() == "n2"
    assert first.on("ssh", HEAD_ADDRESS, "true", check=False).returncode == 255  # there is no sshd
    second.cut_cable()
    try:
        assert first.on("ssh", "-o", "ConnectTimeout=2", second.name, "true", check=False).returncode == 255
    finally:
        second.mend_cable()
    assert first.on("ssh", second.name, "hostname").stdout.strip() == "n2"


def test_a_killed_node_takes_its_processes_along_and_can_be_booted_again(lab: Lab) -> None:
    node = lab.nodes[2]
    process = node.start("sleep", "1000", log="n3.sleep.log")
    node.kill()
    assert process.wait(10) != 0
    node.boot()
    assert node.processes("sleep 1000") == []
    assert run("ssh", node.address, "hostname").stdout.strip() == "n3"
