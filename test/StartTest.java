import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.params.provider.Arguments.arguments;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.stream.Stream;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The ways to start the hook, and the helper that starts it where JBang is not installed. */
class StartTest {

    private static final Path HELPER = Hook.REPOSITORY.resolve("test/jbang");

    @TempDir
    Path temp;

    /** The ways that the README names, each with the command that precedes the hook's arguments. */
    private static Stream<Arguments> ways() {
        List<Arguments> ways = new ArrayList<>(List.of(
                arguments("jbang", List.of(HELPER.toString(), Hook.SCRIPT.toString())),
                // Java's exec, like Kubernetes', does not start a file without #!, as a shell does: so a shell it is.
                arguments("./buildkit-prestop.java", List.of("sh", "-c", Hook.SCRIPT + " \"$@\"", "-"))));
        Tools.jdks().forEach((version, jdk) -> ways.add(arguments("java " + version, List.of(
                jdk.resolve("bin/java").toString(), "-cp", Tools.picocli().toString(), Hook.SCRIPT.toString()))));
        return ways.stream();
    }

    private static Hook start(List<String> way, Map<String, String> env, String... args) {
        List<String> command = new ArrayList<>(way);
        command.addAll(List.of(args));
        return Hook.run(command, env);
    }

    /** Settings for a test, with the helper as the jbang that is on the PATH. */
    private static Map<String, String> environment(Server server) {
        Map<String, String> env = Hook.quick(server.port());
        env.put("PATH", HELPER.getParent() + ":" + System.getenv("PATH"));
        env.put("HOME", Tools.HOME);
        return env;
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("ways")
    void waitsAndLeavesWithTheHooksExitCodeHoweverItWasStarted(String name, List<String> way) {
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook waiting = start(way, environment(server));
                Hook mistaken = start(way, environment(server), "--port", "none")) {
            waiting.awaitLog("1 connection to port " + server.port());
            build.close();
            assertThat(waiting.exitCode()).isZero();
            assertThat(mistaken.exitCode()).isEqualTo(2);
        }
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("ways")
    void everySourceWorksHoweverItWasStarted(String name, List<String> way) {
        List<String> sources = List.of(Tools.require("netstat").getFileName().toString(),
                Tools.require("ss").getFileName().toString(), "procfs");
        List<Hook> hooks = new ArrayList<>();
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            sources.forEach(source -> hooks.add(start(way, environment(server), "--once", "--source", source)));
            for (Hook hook : hooks) {
                assertThat(hook.exitCode()).describedAs(String.join("\n", hook.err())).isZero();
                assertThat(hook.out()).containsExactly("1");
            }
        } finally {
            hooks.forEach(Hook::close);
        }
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("ways")
    void endsAtOnceOnSigtermAndCtrlCHoweverItWasStarted(String name, List<String> way) throws Exception {
        // Ctrl-C as in a terminal: tests in the background ignore it, and so do their children.
        List<String> listening = List.of("env", "--default-signal=INT");
        for (int[] signalAndCode : new int[][] {{15, 143}, {2, 130}}) {
            try (Server server = Server.start(); Server.Connection build = server.connect();
                    Hook hook = start(listening, environment(server), way.toArray(String[]::new))) {
                hook.awaitLog("1 connection to port " + server.port());
                ProcessHandle start = hook.process().toHandle();
                List<ProcessHandle> all = new ArrayList<>();
                List<ProcessHandle> jvms = new ArrayList<>();
                // A shell may wait for ./buildkit-prestop.java, as it does for any command. There is no second JVM,
                // but for the moment in which the child that will be a tool is still a copy of the hook.
                Hook.waitUntil("there is one JVM", () -> {
                    all.clear();
                    Stream.concat(Stream.of(start), start.descendants()).forEach(all::add);
                    jvms.clear();
                    all.stream().filter(process -> process.info().command().orElse("").endsWith("/java"))
                            .forEach(jvms::add);
                    return jvms.size() == 1;
                });
                new ProcessBuilder("kill", "-" + signalAndCode[0], String.valueOf(jvms.get(0).pid())).start().waitFor();
                assertThat(hook.process().waitFor(10, TimeUnit.SECONDS)).isTrue();
                assertThat(hook.exitCode()).isEqualTo(signalAndCode[1]);
                Hook.waitUntil("no process is left", () -> all.stream().noneMatch(ProcessHandle::isAlive));
            }
        }
    }

    @Test
    void runsFromAReadOnlyDirectoryOfSymlinksAsAConfigMapIsMounted() throws IOException {
        Path data = Files.createDirectory(temp.resolve("..2026_11_23_12_00_00.123456789"));
        Files.copy(Hook.SCRIPT, data.resolve("buildkit-prestop.java"));
        Files.createSymbolicLink(temp.resolve("..data"), data.getFileName());
        Path mounted = Files.createSymbolicLink(temp.resolve("buildkit-prestop.java"),
                Path.of("..data/buildkit-prestop.java"));
        Files.setPosixFilePermissions(mounted, PosixFilePermissions.fromString("r--r--r--"));
        Files.setPosixFilePermissions(data, PosixFilePermissions.fromString("r-xr-xr-x"));
        try (Hook hook = start(List.of(HELPER.toString()), Hook.env("HOME", Tools.HOME),
                mounted.toString(), "--once")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.out()).containsExactly("0");
        } finally {
            Files.setPosixFilePermissions(data, PosixFilePermissions.fromString("rwxr-xr-x"));
        }
    }

    @Test
    void runsForAnotherUserFromACacheMadeBeforeOnAReadOnlyFileSystemWithoutNetworkAndHome() throws IOException {
        Tools.requireRoot();
        Map<String, String> env = emptyHome();
        Path script = Files.copy(Hook.SCRIPT, temp.resolve("buildkit-prestop.java"));
        Path helper = Files.copy(HELPER, temp.resolve("jbang"));
        env.put("JBANG_REPO", env.remove("HOME") + "/.m2/repository");
        try (Hook prepare = start(List.of(helper.toString(), "build"), env, script.toString());
                Hook open = start(List.of("chmod", "-R", "a+rX", temp.toString()), Map.of())) {
            assertThat(prepare.exitCode()).isZero();
            assertThat(open.exitCode()).isZero();
        }
        List<String> asNobody = List.of("unshare", "--net", "--mount", "sh", "-c",
                "mount --bind $0 $0 && mount -o remount,ro,bind $0 && exec setpriv --reuid 65534 --regid 65534"
                        + " --clear-groups $0/jbang $0/buildkit-prestop.java --once", temp.toString());
        try (Hook hook = start(asNobody, env)) {
            assertThat(hook.exitCode()).describedAs(String.join("\n", hook.err())).isZero();
            assertThat(hook.out()).containsExactly("0");
        }
    }

    @Test
    void waitsWithinAMemoryLimitOf64MbFromAWarmCache() throws IOException {
        Path group = memoryLimited("64M");
        Map<String, String> env = Hook.env("HOME", Tools.HOME, "MAX_WAIT_SECONDS", "3");
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            env.put("BUILDKITD_PORT", String.valueOf(server.port()));
            try (Hook hook = start(List.of("sh", "-c", "echo $$ > $0/cgroup.procs && exec \"$@\"", group.toString(),
                    HELPER.toString(), Hook.SCRIPT.toString()), env)) {
                hook.awaitLog("1 connection to port " + server.port());
                assertThat(hook.exitCode()).isEqualTo(1);
            }
        } finally {
            Files.delete(group);
        }
    }

    /** A new cgroup, of version 1 or 2, with this memory limit; the test is skipped where none can be made. */
    private static Path memoryLimited(String limit) {
        Path version1 = Path.of("/sys/fs/cgroup/memory");
        boolean one = Files.exists(version1);
        Path group = (one ? version1 : version1.getParent()).resolve("buildkit-prestop-" + System.nanoTime());
        try {
            Files.createDirectory(group);
            Files.writeString(group.resolve(one ? "memory.limit_in_bytes" : "memory.max"), limit);
            if (!one) {
                Files.writeString(group.resolve("memory.swap.max"), "0"); // else what is too much is swapped out
            }
            return group;
        } catch (IOException e) {
            group.toFile().delete();
            return Assumptions.abort("needs the right to make a cgroup with a memory limit: " + e);
        }
    }

    @Test
    void twoStartsAtTheSameMomentOnAColdCacheBothWork() {
        Map<String, String> env = emptyHome();
        List<Hook> hooks = new ArrayList<>();
        try {
            for (int i = 0; i < 4; i++) {
                hooks.add(start(List.of(HELPER.toString()), env, Hook.SCRIPT.toString(), "--once"));
            }
            for (Hook hook : hooks) {
                assertThat(hook.exitCode()).describedAs(String.join("\n", hook.err())).isZero();
                assertThat(hook.out()).containsExactly("0");
            }
        } finally {
            hooks.forEach(Hook::close);
        }
    }

    /** A HOME in which JBang has compiled nothing yet; what was fetched before is there, so no network is needed. */
    private Map<String, String> emptyHome() {
        Path home = temp.resolve("home");
        Tools.copyFetched(home.resolve(".jbang"), home.resolve(".m2/repository"));
        return Hook.env("HOME", home, "JBANG_DIR", home.resolve(".jbang"));
    }

    @Test
    void theHelperTakesTheInstalledJBangAndNotItself() throws IOException {
        Path installed = Files.writeString(Files.createDirectory(temp.resolve("bin")).resolve("jbang"),
                "#!/bin/sh\necho installed: \"$@\"\nexit 7\n");
        Files.setPosixFilePermissions(installed, PosixFilePermissions.fromString("rwxr-xr-x"));
        Path alias = Files.createSymbolicLink(Files.createDirectory(temp.resolve("alias")).resolve("jbang"), HELPER);
        String path = alias.getParent() + ":" + HELPER.getParent() + ":" + installed.getParent() + ":"
                + System.getenv("PATH");
        for (Path start : List.of(HELPER, alias)) {
            try (Hook hook = start(List.of(start.toString()), Hook.env("PATH", path), "run", "a b", "c")) {
                assertThat(hook.exitCode()).isEqualTo(7);
                assertThat(hook.out()).containsExactly("installed: run a b c");
            }
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"java", "mvn"})
    void theHelperSaysWhatIsMissing(String missing) throws IOException {
        Path bin = Files.createDirectory(temp.resolve("bin"));
        for (String tool : List.of("sh", "env", "dirname", "mkdir", "getent", "id", "cut", "mktemp", "rm", "flock")) {
            Files.createSymbolicLink(bin.resolve(tool), Tools.require(tool));
        }
        if (missing.equals("mvn")) {
            Files.createSymbolicLink(bin.resolve("java"), Path.of(System.getProperty("java.home"), "bin/java"));
        }
        try (Hook hook = start(List.of(HELPER.toString()), Hook.env("PATH", bin, "HOME", temp), "--version")) {
            assertThat(hook.exitCode()).isEqualTo(127);
            assertThat(hook.err()).containsExactly("test/jbang: needs JBang, or a JDK 17 or newer and Maven:"
                    + " there is no jbang and no " + missing);
        }
    }

    @Test
    void theHelperPassesOnWhatJBangItselfPrintsAndItsExitCode() {
        Map<String, String> env = Hook.env("HOME", Tools.HOME);
        try (Hook version = start(List.of(HELPER.toString()), env, "--version");
                Hook wrong = start(List.of(HELPER.toString()), env, "no-such-file.java")) {
            assertThat(version.exitCode()).isZero();
            assertThat(version.err()).last().asString().matches("\\d+\\.\\d+\\.\\d+.*");
            assertThat(wrong.exitCode()).isNotZero();
            assertThat(wrong.err()).isNotEmpty();
        }
    }
}
