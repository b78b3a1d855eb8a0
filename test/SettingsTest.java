import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.params.provider.Arguments.arguments;

import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Every setting, by environment and by flag, with good values and bad ones. */
class SettingsTest {

    private static final String PORTS = "is not a whole number from 1 to 65535";
    private static final String FROM_ONE = "is not a whole number from 1 to 2147483647";
    private static final String FROM_ZERO = "is not a whole number from 0 to 2147483647";

    /** Environment name, flag, default, bad values, and what the message says of them. */
    private static Stream<Arguments> badValues() {
        return Stream.of(
                arguments("BUILDKITD_PORT", "--port", "1234", PORTS,
                        List.of("0", "-1", "65536", "70000", "99999999999", "1234x", "tcp", "", " ", "1.5", "0x4d2")),
                arguments("CHECK_FREQUENCY_MS", "--check-frequency-ms", "500", FROM_ONE,
                        List.of("0", "-500", "0.5", "500ms", "2147483648", "")),
                arguments("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "--quiet-seconds", "10", FROM_ZERO,
                        List.of("-1", "10s", "ten", "1e1", "")),
                arguments("MAX_WAIT_SECONDS", "--max-wait-seconds", "0", FROM_ZERO,
                        List.of("-1", "20m", "never", "9999999999", "")),
                arguments("CONNECTION_SOURCE", "--source", "auto", "expected one of [auto, netstat, ss, procfs]",
                        List.of("lsof", "SS", "netstat,ss", "")),
                arguments("LOG_FORMAT", "--log-format", "json", "expected one of [json, text]",
                        List.of("xml", "JSON", "")),
                arguments("LOG_PREFIX", "--log-prefix", "[PreStop Hook]", "Expected parameter",
                        List.of("--", "-V", "--debug", "-hook-", "--port=1")))
                .flatMap(setting -> ((List<?>) setting.get()[4]).stream().map(value -> arguments(
                        setting.get()[0], setting.get()[1], setting.get()[2], setting.get()[3], value)));
    }

    @ParameterizedTest
    @MethodSource("badValues")
    void aBadFlagEndsTheCommand(String variable, String flag, String standard, String allowed, String value) {
        try (Hook hook = Hook.start(Hook.env(), flag + "=" + value)) {
            assertThat(hook.exitCode()).isEqualTo(2);
            assertThat(hook.out()).isEmpty();
            assertThat(hook.err()).singleElement().asString()
                    .contains("'" + flag + "'").contains(allowed).contains(value);
        }
    }

    @ParameterizedTest
    @MethodSource("badValues")
    void aBadValueInTheEnvironmentIsLoggedAndTheDefaultIsUsed(String variable, String flag, String standard,
            String allowed, String value) {
        try (Hook hook = Hook.start(Hook.env(variable, value), "--once")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning").get(0)).contains("Ignoring " + variable + ", using " + standard + ".")
                    .contains(allowed).contains("'" + value + "'");
            assertThat(hook.out()).containsExactly("0");
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"--prot=1234", "--debug=maybe", "extra", "--port", "--once --once"})
    void aCommandLineThatIsNotUnderstoodEndsTheCommand(String arguments) {
        try (Hook hook = Hook.start(Hook.env(), arguments.split(" "))) {
            assertThat(hook.exitCode()).isEqualTo(2);
            assertThat(hook.err()).singleElement().asString().contains(arguments.split("=")[0].split(" ")[0]);
        }
    }

    @Test
    void allBadValuesOfTheEnvironmentTogetherCostNoBuildOnTheDefaultPort() {
        try (Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", "0.0.0.0:1234",
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0", "CHECK_FREQUENCY_MS", "no", "LOG_PREFIX", "--once"))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning").subList(0, 3)).satisfiesExactly(
                    line -> assertThat(line).contains("BUILDKITD_PORT", "0.0.0.0:1234"),
                    line -> assertThat(line).contains("CHECK_FREQUENCY_MS", "'no'"),
                    line -> assertThat(line).contains("LOG_PREFIX", "'--once'"));
            assertThat(hook.messages("info")).anySatisfy(line -> assertThat(line).contains("to port 1234"));
        }
    }

    /** As it does in every container of a namespace with a Service named buildkitd. */
    @Test
    void whatKubernetesSetsForAServiceIsNoSetting() {
        try (Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", "tcp://10.96.83.161:4321",
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0"))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).anySatisfy(line -> assertThat(line).contains("to port 1234"));
            assertThat(hook.messages("warning")).noneMatch(line -> line.contains("Ignoring"));
        }
    }

    @ParameterizedTest
    @CsvSource({"unix:///run/b.sock, ' and 0 to /run/b.sock.'", "'b.sock\n', ' and 0 to b.sock.'", "'', .", "-x, -x."})
    void theSocketMayBeAnAddressOrNothing(String value, String logged) {
        try (Hook hook = Hook.start(Hook.env("BUILDKITD_SOCKET", value), "--quiet-seconds=0")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).anySatisfy(
                    line -> assertThat(line).contains("0 connections to port 1234").contains(logged + " Waited"));
            assertThat(hook.messages("info")).noneMatch(line -> value.isEmpty() && line.contains(" and "));
        }
    }

    /** JVMs take them from the environment, so an image may have them for its own. */
    @ParameterizedTest
    @ValueSource(strings = {"-XX:+UseG1GC", "-XX:+UseParallelGC", "-XX:+UseZGC", "-XX:+UseShenandoahGC", "-Xms64m",
        "-Xmn200m", "-XX:MaxPermSize=64m", "--add-modules=java.sql", "-Dcom.sun.management.jmxremote.port=0"
            + " -Dcom.sun.management.jmxremote.authenticate=false -Dcom.sun.management.jmxremote.ssl=false"})
    void noOptionForOtherJvmsEndsTheHook(String options) {
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(Hook.env("JAVA_TOOL_OPTIONS", options, "LOG_FORMAT", "text",
                        "BUILDKITD_PORT", server.port(), "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0"))) {
            hook.awaitLog("1 connection to port " + server.port());
            build.close();
            assertThat(hook.exitCode()).isZero();
        }
    }

    @Test
    void theDefaultsAreThoseOfTheContract() {
        try (Hook hook = Hook.start(Hook.env("DEBUG", "1"))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.age()).isGreaterThan(Duration.ofSeconds(10));
            assertThat(hook.messages("debug")).hasSizeBetween(20, 21);
            assertThat(hook.messages("info")).contains(
                    "[PreStop Hook] 0 connections to port 1234 and 0 to buildkitd.sock. Waited 0 s so far.");
        }
    }

    @ParameterizedTest
    @CsvSource({"BUILDKITD_PORT, --port", "BUILDKITD_SOCKET, --socket", "CHECK_FREQUENCY_MS, --check-frequency-ms",
        "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS, --quiet-seconds", "MAX_WAIT_SECONDS, --max-wait-seconds",
        "CONNECTION_SOURCE, --source", "LOG_FORMAT, --log-format", "LOG_PREFIX, --log-prefix"})
    void aFlagWinsOverTheEnvironment(String variable, String flag) {
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            Map<String, String> good = Map.of("BUILDKITD_PORT", String.valueOf(server.port()),
                    "BUILDKITD_SOCKET", "good.sock",
                    "CHECK_FREQUENCY_MS", "50", "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "3600",
                    "MAX_WAIT_SECONDS", "1", "CONNECTION_SOURCE", "procfs", "LOG_FORMAT", "text",
                    "LOG_PREFIX", "good:");
            Map<String, String> other = Map.of("BUILDKITD_PORT", "9", "BUILDKITD_SOCKET", "other.sock",
                    "CHECK_FREQUENCY_MS", "600000",
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0", "MAX_WAIT_SECONDS", "600",
                    "CONNECTION_SOURCE", "ss", "LOG_FORMAT", "json", "LOG_PREFIX", "other:");
            // All by environment, then one by flag with another value in the environment: they must do the same.
            Map<String, String> onlyEnvironment = Hook.env("PATH", "/nowhere", "DEBUG", "1");
            onlyEnvironment.putAll(good);
            Map<String, String> withFlag = Hook.env("PATH", "/nowhere", "DEBUG", "1");
            withFlag.putAll(good);
            withFlag.put(variable, other.get(variable));
            Map<String, String> badEnvironment = Hook.env("PATH", "/nowhere", "DEBUG", "1");
            badEnvironment.putAll(good);
            badEnvironment.put(variable, variable.equals("LOG_PREFIX") ? "" : "?");
            try (Hook one = Hook.start(onlyEnvironment); Hook two = Hook.start(withFlag, flag, good.get(variable));
                    Hook three = Hook.start(badEnvironment, flag + "=" + good.get(variable))) {
                for (Hook hook : List.of(one, two, three)) {
                    assertThat(hook.exitCode()).isEqualTo(1);
                    List<String> lines = new ArrayList<>(hook.err());
                    assertThat(lines.remove(0)).isEqualTo("good: Waiting for build processes to finish...");
                    assertThat(lines).contains("good: Active connections to buildkitd: 1").hasSizeGreaterThan(3);
                    assertThat(lines.get(lines.size() - 1))
                            .isEqualTo("good: Giving up after MAX_WAIT_SECONDS, 1 s: 1 connection to port "
                                    + server.port() + " from 127.0.0.1:" + build.client().getLocalPort()
                                    + " and 0 to good.sock.");
                }
            }
        }
    }

    @Test
    void spacesAroundANumberDoNotMakeItBad() {
        try (Server server = Server.start(); Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", server.port() + "\n"),
                "--once")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).isEmpty();
        }
    }

    @ParameterizedTest
    @CsvSource({"1,, 1", "1, --debug, 1", ", --debug, 1", "0,, 1", "'',, 0"})
    void debugIsOnByEnvironmentOrByFlag(String variable, String flag, int checks) {
        Map<String, String> settings = Hook.env("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0");
        if (variable != null) {
            settings.put("DEBUG", variable);
        }
        try (Hook hook = flag == null ? Hook.start(settings) : Hook.start(settings, flag)) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("debug")).hasSize(checks);
        }
    }

    @Test
    void helpNamesEveryFlagItsVariableItsDefaultAndTheExitCodes() {
        try (Hook hook = Hook.start(Hook.env(), "--help")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).isEmpty();
            String help = String.join("\n", hook.out()).replaceAll("\\s+", " ");
            badValues().forEach(setting -> assertThat(help)
                    .containsPattern(setting.get()[1] + "=\\w+ [^=]*\\(" + setting.get()[0] + "\\) Default: "
                            + Pattern.quote(setting.get()[2] + " ")));
            assertThat(help).contains("--socket=PATH", "(BUILDKITD_SOCKET) Default: buildkitd.sock", "--debug", "DEBUG",
                    "--once", "Exit codes: 0 quiet long enough", " 1 gave up at MAX_WAIT_SECONDS",
                    " 2 bad command line");
        }
    }

    @Test
    void versionIsOneLine() {
        try (Hook hook = Hook.start(Hook.env(), "--version")) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.out()).singleElement().asString().matches("buildkit-prestop \\d+\\.\\d+\\.\\d+");
        }
    }
}
